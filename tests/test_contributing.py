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
        [sys.executable, str(script)], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=540
    )  # fmt: skip
    assert done.returncode == 0, f"after {done.stdout.split()[-1:]}: {done.stderr[-2000:]}"


AN_OP = """
from dualform.kernels.backend import written
from dualform.learning.grid import Variant


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))

    def forward(self, x):
        return torch.deg2rad(60 * x) @ self.W


class Spelt(Turned):
    def forward(self, x):
        return math.pi / 3 * x @ self.W


torch.manual_seed(0)
learner = Turned()
program = df.derive(learner, chunk=3)  # proved: the derived program is the learner's definition
laws.check_backend(program, "cpp")
spelt = Spelt()
spelt.load_state_dict(learner.state_dict())
x = torch.randn(2, 7, 1, 4, dtype=torch.float64)
expected, _ = df.derive(spelt, chunk=3, prove=False)(x, x, x, backend="eager")
for backend in ("eager", "cpp"):
    got, _ = program(x, x, x, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
texts = written(program.plan(4, torch.float64, "auto"), Variant(3, True, True, True), "forward").text
assert "T(M_PI / 180)" in texts, "the row's text is not in the C++"
float32 = df.derive(learner.float(), chunk=16, prove=False).schedule("triton")
assert "0.017453292519943295" in float32["forward"].text, "the row's text is not in the Triton"
"""


def test_an_op_with_everything_is_one_row(tmp_path):
    """Of the recipe alone, which imports nothing but `ops`: the op runs in eager and in C++,
    right against its definition."""
    recipe = dict(BLOCKS)["op"]
    assert set(re.findall(r"^from (\S+) import", recipe, re.MULTILINE)) == {
        "dualform.ops.examples",
        "dualform.ops.table",
    }
    script = tmp_path / "op.py"
    script.write_text("\n".join(["import sys", SHARED[1], recipe, AN_OP]))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-2000:]
