"""Python files that a model is made with, told apart by what is in them; none runs without the user's word.

A bundle is a file and those beside it that it imports, named by digests: {"mine.py": SHA-256, "helper.py": SHA-256}.
Its key is the digest of these. It may run once the user has named its file (then a copy is kept in the cache folder, so
that it is known on this machine) or has said so for a folder that came with it. It is imported as a package of its own,
`dualform_code_<key>`, so that files of one name never meet; imports of a neighbour become relative ones.
"""

from __future__ import annotations

import ast
import hashlib
import json
import linecache
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from dualform.caches import cache_folder, is_private
from dualform.catalogue import CatalogueError

PREFIX, FOLDER = "dualform_code_", "code"
Files = dict[str, bytes]


class CodeError(CatalogueError):
    """A file of the user's own that cannot be read, run or saved."""


class UntrustedCodeError(CodeError):
    """Code that came with a model, and that nobody has said may run."""


_files: dict[str, Files] = {}
_places: dict[str, Path] = {}  # where a bundle was read, for tracebacks and messages
_allowed: set[str] = set()


def digests(files: Files) -> dict[str, str]:
    return {name: hashlib.sha256(files[name]).hexdigest() for name in files}


def key_of(code: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(code.items())).encode()).hexdigest()[:32]


def parsed(file: Path, data: bytes) -> ast.Module:
    try:
        return ast.parse(data, str(file))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        at = f"{file}:{line}" if line else f"{file}"
        raise CodeError(f"{at} is not Python ({getattr(error, 'msg', error)}); expected a file that runs.") from None


def read(path: Path) -> Files:
    """Read a file, and those beside it that it imports, and that they do.

    Raises: CodeError for what is no file, no Python, or imports what cannot be taken along.
    """
    found, waiting = dict[str, bytes](), [path]
    while waiting:
        file = waiting.pop()
        if file.name in found:
            continue
        try:
            found[file.name] = file.read_bytes()
        except OSError as error:
            raise CodeError(f"{file} cannot be read ({error.strerror}); expected a Python file.") from None
        for name, level, line in _imported(parsed(file, found[file.name])):
            beside, inside = path.parent / f"{name}.py", path.parent / name / "__init__.py"
            if level > 1:
                _refuse(file, line, "from a folder above it", "Move what it needs beside it.")
            if beside.is_file() and (level or (name not in sys.stdlib_module_names and beside.name != file.name)):
                waiting.append(beside)
            elif level or (inside.is_file() and not _is_installed(name)):
                advice = "Put what it needs into files beside it, or install the package."
                _refuse(file, line, f"{name!r}, which is a folder or not there", advice)
    return found


def _refuse(file: Path, line: int, what: str, advice: str) -> None:
    raise CodeError(f"{file}:{line} imports {what}; expected files beside it, which are saved with it. {advice}")


def _imported(tree: ast.Module) -> Iterator[tuple[str, int, int]]:
    """Yield the first name of each import, how many dots are before it, and its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], 0, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((name.partition(".")[0], node.level, node.lineno) for name in names)


def _is_installed(name: str) -> bool:
    """Is there such a package that is not only found because of where this process runs?"""
    places = [place for place in sys.path if place and Path(place).resolve() != Path.cwd()]
    return PathFinder.find_spec(name, places) is not None


class _Relative(ast.NodeTransformer):
    """Let a file import its neighbours from its own bundle."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def visit_Import(self, node: ast.Import) -> list[ast.stmt]:
        own = [alias for alias in node.names if alias.name in self.names]
        others = [alias for alias in node.names if alias.name not in self.names]
        new: list[ast.stmt] = [ast.ImportFrom(module=None, names=own, level=1)] if own else []
        return [ast.copy_location(statement, node) for statement in new + ([ast.Import(others)] if others else [])]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        node.level = 1 if node.level == 0 and node.module in self.names else node.level
        return node


def keep(files: Files, place: Path) -> str:
    """Hold the bytes of a bundle that was read at a place; return its key. It may not run yet."""
    key = key_of(digests(files))
    _files.setdefault(key, files)
    _places.setdefault(key, place)
    return key


def allow(key: str, *, remember: bool) -> None:
    """Let a bundle run in this process; remember: and in later ones of this user's on this machine."""
    _allowed.add(key)
    base = cache_folder() / FOLDER
    if not remember or (base / key).exists():
        return
    try:
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=base) as work:
            for name, data in _files[key].items():
                made = Path(work) / key / name
                made.parent.mkdir(exist_ok=True)
                made.write_bytes(data)
            (Path(work) / key).rename(base / key)
    except OSError:  # it cannot be written, or another process was first: then it is asked for, or it is there
        return


def files_of(code: Mapping[str, str]) -> Files | None:
    """Return the bytes of a bundle, if they have been read."""
    return _files.get(key_of(code))


def is_allowed(code: Mapping[str, str]) -> bool:
    """May a bundle run? Its user has said so in this process, or has run the same bytes before on this machine."""
    key = key_of(code)
    if key not in _allowed:
        base = cache_folder() / FOLDER
        try:
            if not (is_private(base) and is_private(base / key)):
                return False
            files = {file.name: file.read_bytes() for file in (base / key).iterdir()}
        except OSError:
            return False
        if digests(files) != dict(code):
            return False
        keep(files, base / key)
        _allowed.add(key)
    return True


def gather(code: Mapping[str, str], find: Callable[[str], Path | None], where: str) -> str:
    """Read the files that came with a model, which must be those that its configuration names; run nothing.

    Raises: CodeError if one is missing or has changed.
    """
    key, files, place = key_of(code), dict[str, bytes](), Path()
    for name in code:
        expect_plain(name)
    for name, digest in code.items():
        found = find(f"{FOLDER}/{key}/{name}")
        if found is None:
            raise CodeError(
                f"{where}: {FOLDER}/{key}/{name} is missing; expected the file that config.json names. Copy it too, or "
                "pass the class or its file: from_pretrained(..., learner=Mine)."
            )
        files[name], place = found.read_bytes(), found.parent
        if (now := hashlib.sha256(files[name]).hexdigest()) != digest:
            raise CodeError(
                f"{where}: {found} has changed since the model was saved: its SHA-256 is {now[:12]}; expected "
                f"{digest[:12]}, which config.json names. Put it back; or, if the change is yours, pass the file "
                "itself: from_pretrained(..., learner='mine.py:Mine')."
            )
    keep(files, place)
    return key


def expect_plain(name: str) -> None:
    """Refuse names that lead out of a bundle's folder."""
    if not (name.endswith(".py") and name.removesuffix(".py").isidentifier()):
        raise CodeError(f"code names the file {name!r}; expected the name of a Python file. The folder is damaged.")


def write(code: Mapping[str, str], folder: Path) -> bool:
    """Write a bundle's files into a model's folder; return whether there are any."""
    files = files_of(code)
    place = folder / FOLDER / key_of(code)
    for name, data in (files or {}).items():
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    return files is not None


def described(code: Mapping[str, str]) -> str:
    """Say which files a bundle is, how long they are, and where they can be read."""
    key = key_of(code)
    files, place = _files.get(key), _places.get(key)
    if files is None:
        return ", ".join(f"{name} (SHA-256 {digest[:12]}, not here)" for name, digest in code.items())
    return ", ".join(
        f"{name if place is None else place / name} ({len(files[name].splitlines())} lines, SHA-256 {digest[:12]})"
        for name, digest in code.items()
    )


class BundleFinder(MetaPathFinder, Loader):
    """Import what is in a bundle that may run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        top, _, stem = name.partition(".")
        if not top.startswith(PREFIX):
            return None
        key = top.removeprefix(PREFIX)
        _expect_allowed(key)
        if not stem:
            return ModuleSpec(name, self, is_package=True)
        if f"{stem}.py" not in _files[key]:
            return None
        spec = ModuleSpec(name, self, origin=str(_places[key] / f"{stem}.py"))
        spec.has_location = True
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        top, _, stem = module.__name__.partition(".")
        if not stem:
            return
        files = _files[top.removeprefix(PREFIX)]
        file, data = str(module.__file__), files[f"{stem}.py"]
        text = data.decode("utf-8", "replace")
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # the lines that ran
        tree = _Relative({name.removesuffix(".py") for name in files}).visit(parsed(Path(file), data))
        exec(compile(tree, file, "exec", dont_inherit=True), vars(module))


def _expect_allowed(key: str) -> None:
    if key in _allowed:
        return
    folder = cache_folder() / FOLDER / key
    code: dict[str, str] = {}
    if folder.is_dir():
        code = digests({file.name: file.read_bytes() for file in folder.iterdir()})
    if key_of(code) != key or not is_allowed(code):
        raise UntrustedCodeError(
            f"import: {PREFIX}{key} is code that came with a model, and is not known here; expected it to be allowed. "
            "Load the model's folder first: from_pretrained(folder, trust_remote_code=True)."
        )


def install() -> None:
    """Let Python import bundles, as a pickle of a model asks for."""
    if not any(isinstance(finder, BundleFinder) for finder in sys.meta_path):
        sys.meta_path.append(BundleFinder())


install()
