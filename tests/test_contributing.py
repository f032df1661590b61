"""The recipes of CONTRIBUTING.md run as they stand, each with its law."""

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
KINDS = {"learner", "rule", "objective", "op", "expansion", "backend", "preset", "form"}
# (heading, code): the first, of the imports, belongs to all
BLOCKS = re.findall(r"^### An? (\w+)\n[^`]*?(?:`[^`]+`[^`]*?)*?```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
SHARED = re.search(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_there_is_a_short_recipe_for_everything_that_can_be_added():
    assert {kind for kind, _ in BLOCKS} == KINDS
    for kind, code in BLOCKS:
        own = [
            line
            for line in code.splitlines()
            if line and not line.startswith(("from ", "import ")) and '"""' not in line
        ]
        assert len(own) <= 5, f"{kind}: {len(own)} lines of code"


def test_every_recipe_runs_and_keeps_its_law(tmp_path):
    """In a process of its own: what the recipes register is in no other test's catalogues."""
    parts = [SHARED[1], *(f"print('{kind}', flush=True)\n{code}" for kind, code in BLOCKS)]
    script = tmp_path / "recipes.py"
    script.write_text("\n".join(parts))
    done = subprocess.run(
        [sys.executable, str(script)], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=540
    )  # fmt: skip
    assert done.returncode == 0, f"after {done.stdout.split()[-1:]}: {done.stderr[-2000:]}"
