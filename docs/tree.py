"""Write the tree of files into docs/architecture.md, from their first lines: python docs/tree.py."""

import ast
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src" / "dualform"
START, STOP = "<!-- tree: python docs/tree.py -->\n", "<!-- end of the tree -->"
# From the ground up: each folder imports only from those before it.
FOLDERS = [
    "algebra", "ops", "graphs", "explanations", "calculus", "functions", "learning", "kernels", "models", "train",
    "cli", "testing",
]  # fmt: skip


def first_line(path: Path) -> str:
    """Return the first sentence that a file says of itself."""
    text = path.read_text()
    if path.suffix == ".h":
        return text.splitlines()[0].removeprefix("// ")
    return (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]


def folder_line(folder: str) -> str:
    return first_line(SOURCE / folder / "__init__.py")


def tree() -> str:
    """Return every file with its first line, folder by folder."""
    own = sorted(p for p in SOURCE.glob("*.py") if p.name not in ("__init__.py", "__main__.py"))
    lines = ["### The ground\n", *(f"- `{p.name}`: {first_line(p)}" for p in own)]
    for folder in FOLDERS:
        files = sorted(p for p in (SOURCE / folder).iterdir() if p.suffix in (".py", ".h") and p.name != "__init__.py")
        lines += [f"\n### `{folder}/`\n", folder_line(folder), "", *(f"- `{p.name}`: {first_line(p)}" for p in files)]
    return "\n".join(lines) + "\n\n"


def written(page: str) -> str:
    """Return the page with the tree of today."""
    before, rest = page.split(START)
    return before + START + "\n" + tree() + STOP + rest.split(STOP)[1]


if __name__ == "__main__":
    page = HERE / "architecture.md"
    page.write_text(written(page.read_text()))
