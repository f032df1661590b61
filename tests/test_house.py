"""The house keeps its own rules: imports go one way, its pages show what is on disk, the wheel stands alone."""

import ast
import importlib.util
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import torch

import dualform as df
from dualform.learning import program as program_module

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "dualform"
# Each imports only from those before it (DESIGN, section 4); files of one folder may import each other, without cycles.
floors = [
    "auto_classes",
    "shapes",
    "bounded",
    "storages",
    "caches",
    "catalogue",
    "bundles",
    "own_code",
    "algebra",
    "ops",
    "graphs",
    "explanations",
    "calculus",
    "functions",
    "learning",
    "kernels",
    "models",
    "train",
    "cli",
    "testing",
]
extras = ["transformers", "accelerate", "cyclopts", "rich", "matplotlib", "plotille"]
modules = sorted(SOURCE.rglob("*.py"))


def module_name(path):
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def internal_imports(path):
    """Yield (imported module, is it inside a function) for every import of our own."""
    tree = ast.parse(path.read_text())
    known = {module_name(p) for p in modules}
    for branch in [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]:
        branch.body = []  # for type checkers only: nothing is imported
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.Lambda) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in below]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "dualform":
                yield name, id(node) in inside


def type_imports(path):
    """Yield every import of our own that is for type checkers alone."""
    for branch in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.If)):
        if "TYPE_CHECKING" in ast.unparse(branch.test):
            for node in (n for statement in branch.body for n in ast.walk(statement)):
                names = (
                    [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
                )
                yield from (name for name in names if name and name.split(".")[0] == "dualform")


def test_types_need_no_import_that_running_may_not_make():
    """A circle for type checkers alone is a circle: only the front door names what it loads when asked."""
    found = {str(p.relative_to(SOURCE)): [*type_imports(p)] for p in modules}
    assert [p for p, names in found.items() if names] == ["__init__.py"]


# Named like what they show, try or are a row of, on another floor.
ALIKE = {"__init__", "attention", "pointwise", "layer"}


def test_a_word_has_one_meaning():
    """A class has one name and a name one class; a module's name is in one folder, but for commands and laws."""
    classes, folders = {}, {}
    for path in modules:
        if path.parent.name not in ("cli", "testing"):
            folders.setdefault(path.stem, set()).add(path.parent.name)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes.setdefault(node.name, []).append(str(path.relative_to(SOURCE)))
    assert {name for name, places in classes.items() if len(places) > 1} == set()
    assert {name: places for name, places in folders.items() if len(places) > 1 and name not in ALIKE} == {}


def floor_of(name):
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else None


@pytest.mark.parametrize("path", modules, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    own = floor_of(module_name(path))
    for name, is_inside in internal_imports(path):
        assert not is_inside, f"{path} imports {name} inside a function"
        if own is None or own in ("__main__", "moved"):
            continue  # the front doors see every floor but the roof
        assert own in floors, f"{path} is on no floor"
        assert floor_of(name) in floors, f"{path} imports {name}, which is on no floor"
        assert floors.index(floor_of(name)) <= floors.index(own), f"{path} imports upwards: {name}"
        assert own == "testing" or floor_of(name) != "testing", f"{path} imports the roof"


def test_no_import_goes_round_in_a_circle():
    graph = {module_name(p): {name for name, _ in internal_imports(p)} for p in modules}
    done, path = set(), []

    def visit(name):
        if name in path:
            raise AssertionError(" -> ".join([*path[path.index(name) :], name]))
        if name not in done:
            path.append(name)
            for other in sorted(graph.get(name, ())):
                visit(other)
            done.add(path.pop())

    for name in graph:
        visit(name)


def load_tree():
    spec = importlib.util.spec_from_file_location("tree", ROOT / "docs" / "tree.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_architecture_page_shows_the_files_on_disk():
    """Made anew by `python docs/tree.py`; every file says in its first line what it is, every folder too."""
    page, tree = (ROOT / "docs" / "architecture.md").read_text(), load_tree()
    assert tree.written(page) == page, "docs/architecture.md is not of today: run python docs/tree.py"
    assert set(tree.FOLDERS) == {p.name for p in SOURCE.iterdir() if (p / "__init__.py").exists()}
    assert [f for f in floors if f in tree.FOLDERS] == tree.FOLDERS


def test_the_readme_has_one_line_per_folder():
    (block,) = re.findall(
        r"^```\nsrc/dualform/\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE
    )
    shown = re.findall(r"\b(\w+)/", block)
    assert shown == load_tree().FOLDERS


def test_no_file_is_empty_and_none_names_this_machine():
    for path in modules:
        assert path.read_text().strip(), f"{path} is empty"
        assert "/work/" not in path.read_text(), f"{path} names a machine's path"


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f'__version__ = "{project["version"]}"' in (SOURCE / "__init__.py").read_text()
    assert f"version: {project['version']}" in (ROOT / "CITATION.cff").read_text()
    assert set(project["optional-dependencies"]) == {"models", "sklearn", "viz", "triton", "dev"}
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    assert pinned["torch"] == "2.13.0"
    assert "hatchling" in pinned


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Build a wheel and install it, without extras, into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    target = folder / "target"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True, capture_output=True)
    return target


def run_without_extras(target, code):
    """Run code where the wheel is installed and no extra is."""
    refuse = f"""
        import sys
        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {extras!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        sys.meta_path.insert(0, Refuse())
    """
    program = textwrap.dedent(refuse) + textwrap.dedent(code)
    env = {"PYTHONPATH": str(target), "PATH": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)


def test_the_wheel_stands_alone(installed):
    done = run_without_extras(
        installed,
        """
        import dualform as df
        assert df.__file__.startswith(sys.path[1]), df.__file__
        layer = df.TestTimeTraining(8, 2, learner="linear", chunk=4)
        import torch
        y, state = layer(torch.randn(1, 5, 8))
        print(tuple(y.shape))
        try:
            df.DualformConfig
        except ImportError as error:
            print(error)
        print(df.RPNRegressor([{}]).fit([[0.0], [1.0], [2.0]], [0.0, 1.0, 2.0]).formula())
        """,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(1, 5, 8)\ndualform.DualformConfig: the package 'transformers' is not installed")
    assert "the extra 'models'" in done.stdout
    assert done.stdout.endswith("y = x0\n")  # the estimators need scikit-learn alone
    assert (installed / "dualform" / "py.typed").exists()


def test_the_script_names_a_missing_extra(installed):
    done = run_without_extras(installed, "import runpy; runpy.run_module('dualform', run_name='__main__')")
    assert done.returncode == 1
    assert "expected the extra 'models'" in done.stderr


def test_import_is_light(installed):
    done = run_without_extras(
        installed, f"import dualform; print([m for m in {[*extras, 'sklearn']!r} if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr
    heavy = ["torch._dynamo", "torch._inductor", "sympy", "scipy", "matplotlib"]  # half a second each, or more
    done = run_without_extras(installed, f"import dualform; print([m for m in {heavy!r} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


# What one place does: (what a second place would write, the files that may).
ONE_PLACE = {
    "nodes are added": (r"\.call_function\(|\.create_node\(|\.placeholder\(", {"graphs/edit.py", "graphs/recorder.py", "graphs/verify.py", "learning/shipped.py", "kernels/targets.py"}),
    "inputs and results are "
    "found": (r'n\.op == "placeholder"\]|find_nodes\(op="(placeholder|output)"|\.op == "output"\]', {"graphs/edit.py"}),
    "a graph is cut": (r"networkx|maximum_flow|def minimum_cut", {"graphs/cut.py"}),
    "equal calls are one": (r"def (without_repeats|\w*_cse)|fx_graph_cse", {"graphs/edit.py"}),
    "what is reached is collected": (r"def _?(reached|needed)\(", {"graphs/edit.py"}),
    "closed-over tensors are found and lifted": (r'find_nodes\(op="get_attr"', {"graphs/edit.py"}),
    "a graph is run node by "
    "node": (r"\w+\[(n|node)\] = (n|node)\.target\(|fx\.Interpreter", {"graphs/edit.py", "kernels/lowering.py"}),
    "an expand is left to "
    "broadcasting": (r"def _?\w*(broadcasts|expands?)\w*\(graph|def "
    r"broadcasts\(", {"graphs/edit.py", "graphs/straight_line.py", "graphs/regroup.py"}),
    "a contraction is planned": (r"opt_einsum\.(paths|contract)|DynamicProgramming\(", {"algebra/planner.py"}),
    "which memory a tensor lies in": (r"storage\(\)\.data_ptr|storage\(\)\._cdata|_cdata\b", {"storages.py"}),
    "modes are switched off": (r"_disable_current_modes\(", {"graphs/this_thread.py"}),
    "what is remembered is bounded": (r"OrderedDict|\.popitem\(", {"bounded.py"}),
    "an op has a sign in Python": (r'mm[.\w"]*: "@"|mul[.\w"]*: "[*]"|"\{0\} @ \{1\}', {"ops/products.py"}),
    "gelu is spelt out": (r"0\.044715", {"ops/elementary.py", "functions/symbolic.py"}),
    "forms are known by "
    "name": (r'form == "|"dual", "primal"', {"learning/forms.py", "learning/op.py", "learning/program.py"}),
}  # fmt: skip


@pytest.mark.parametrize("idea", ONE_PLACE)
def test_an_idea_has_one_place(idea):
    pattern, allowed = ONE_PLACE[idea]
    places = {str(p.relative_to(SOURCE)) for p in modules if re.search(pattern, p.read_text())}
    assert places <= allowed, f"{idea} in {sorted(places - allowed)} too: use what {sorted(allowed)[0]} has"
    assert places, f"nothing matches {pattern}: the law does not bite"


# -- how a call travels ------------------------------------------------------------------------------------------------


def watch(run, look):
    """Run with `look(frame, handed)` at each function of ours that this thread enters or leaves: its arguments,
    or its result."""

    def see(frame, event, result):
        code = frame.f_code
        if event in ("call", "return") and code.co_filename.startswith(str(SOURCE)):
            given = [frame.f_locals[name] for name in code.co_varnames[: code.co_argcount]]
            look(frame, given if event == "call" else [result])

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        return run()
    finally:
        sys.setprofile(before)


def eager_layer(**options):
    torch.manual_seed(0)
    layer = df.TestTimeTraining(20, 2, learner=df.learners.residual_norm("mlp"), chunk=5, **options)
    layer.backend = "eager"
    return layer


@pytest.mark.parametrize("prove", [False, True])
def test_a_first_eager_call_enters_few_files(prove, tmp_path, monkeypatch):
    """In the calling thread: a block that no proof has traced yet is traced by another one, as at `derive`."""
    monkeypatch.setenv("DUALFORM_PROVE", "1")
    monkeypatch.setenv("DUALFORM_CACHE", str(tmp_path))
    monkeypatch.setattr(program_module, "_structures", program_module.Bounded(16))
    monkeypatch.setattr(program_module, "_programs", program_module.Bounded(16))
    layer, x = eager_layer(prove=prove), torch.randn(2, 10, 20)
    for call in (lambda: layer(x), lambda: layer(x)[0].sum().backward()):
        files = set()
        watch(call, lambda frame, _, files=files: files.add(frame.f_code.co_filename))
        names = sorted(str(Path(f).relative_to(SOURCE)) for f in files)
        assert "learning/loop.py" in names
        assert len(names) <= 18, names


def tensors_in(value):
    """The tensors that a record of ours, or a list, holds itself; what it has by name counts as held."""
    own = value if isinstance(value, list | tuple) else getattr(value, "__dict__", {}).values()
    return [x for y in own for x in (y.values() if isinstance(y, dict) else [y]) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("learns", [False, True])
def test_no_value_is_repackaged_more_than_twice(learns):
    """From the layer's call of its program to the run that a backend is given: a value is in one record,
    then in two more.

    Counted are records of ours, and lists, that a function of ours is given or gives and that hold the value's memory.
    What holds such a record is not another one, nor is a list of the same memory: torch copies the list that an op is
    given.
    """
    layer, x = eager_layer(), torch.randn(2, 11, 20)
    with torch.no_grad():
        _, state = layer(x)
    found, seen = {}, {}

    def look(frame, handed):
        seen.update({"backend": True} if frame.f_code.co_qualname.startswith("GridCall") else {})
        for value in handed if "backend" not in seen else ():
            ours = type(value).__module__.startswith("dualform") and not isinstance(value, torch.nn.Module | type)
            if ours or type(value) is list:
                held = [t.data_ptr() for t in tensors_in(value)]
                found.setdefault((type(value), *([id(value)] if ours else held)), (value, set(held)))

    with torch.set_grad_enabled(learns):
        watch(lambda: layer(x, state), look)
    calls = [value for value, _ in found.values() if type(value).__name__ == "Call"]
    assert seen, "no run was made: the law does not bite"
    values = {name: getattr(calls[-1], name) for name in ("q", "k", "v")} | {"lr": calls[-1].gates["lr"]}
    values |= {"state": next(iter(state.memory.anchor.values()))}
    values |= {part: next(iter(getattr(calls[-1], part).values())) for part in ("init", "slow")}
    for name, x in values.items():
        records = [type(value).__name__ for value, held in found.values() if x.data_ptr() in held]
        assert len(records) <= 3, f"{name} is in {records}"


def lines_of(path):
    return len(path.read_text().splitlines())


def test_a_file_is_read_in_one_sitting():
    long = {str(p.relative_to(SOURCE)) for p in modules if lines_of(p) > 450}
    assert not long, f"over 450 lines: {sorted(long)}: cut them by their ideas"


ROWS_OF_TABLES = re.compile(r'examples=|call\(|"[^"]*"(, |: |\))')


def test_long_lines_are_rows_of_tables():
    """A line is longer than 120 characters in the ops' tables of rows alone."""
    long = [
        f"{p.relative_to(SOURCE)}:{k}"
        for p in modules
        for k, line in enumerate(p.read_text().splitlines(), 1)
        if len(line) > 120 and not (p.parent.name == "ops" and ROWS_OF_TABLES.search(line))
    ]
    assert not long, f"lines of more than 120 characters: {long}"


TYPED = ["call", "plan", "loop", "op", "backends"]


@pytest.mark.parametrize("path", [*(f"learning/{name}.py" for name in TYPED), "kernels/backend.py"])
def test_what_a_backend_is_given_has_types(path):
    """No `Any` from a call to its backend, and no argument or result without a type."""
    tree = ast.parse((SOURCE / path).read_text())
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "Any"]
    for f in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]:
        given = [a for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs) if a.arg not in ("self", "cls")]
        assert f.returns is not None, f"{path}: {f.name} has no type of its result"
        assert all(a.annotation for a in given), f"{path}: {f.name} has an argument without a type"


# What is known of an op stands in its row. These lists name no ops of a trace, or stand below the rows.
NO_ROWS = {
    "algebra/axis_names.py": "functions of Python that an error of shapes is about, below ops/",
    "kernels/triton_ops.py": "functions of our own in Triton, called as ops in place are",
}
WORDS = {"functions", "cli"}  # what people write in formulas and options
OPS = {name.removeprefix("aten::").partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")}  # fmt: skip


def names_op(x):
    if isinstance(x, ast.Constant):
        return isinstance(x.value, str) and (x.value.startswith("aten::") or x.value in OPS)
    return isinstance(x, ast.Attribute) and re.match(r"aten\.|torch\.ops\.", ast.unparse(x)) is not None


def lists_of_ops(text):
    """Lines of literal sets, lists, tuples and keys, most of which name ops, three or more;
    and of strings of nothing else."""
    for node in ast.walk(ast.parse(text)):
        found = node.elts if isinstance(node, ast.Set | ast.List | ast.Tuple) else []
        found = node.keys if isinstance(node, ast.Dict) else found
        words = node.value.split() if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
        count = sum(map(names_op, found))
        if (count >= 3 and 2 * count > len(found)) or (len(words) >= 3 and all(x in OPS for x in words)):
            yield node.lineno


def test_no_list_of_ops_stands_outside_the_rows():
    places = {}
    for path in modules:
        name = str(path.relative_to(SOURCE))
        if floor_of(module_name(path)) not in {"ops", *WORDS} and (lines := [*lists_of_ops(path.read_text())]):
            places[name] = lines
    assert set(places) <= set(NO_ROWS), f"lists of ops in {places}: say it in a column of their rows (ops/table.py)"
    assert set(places) == set(NO_ROWS), "an exception that is none any more"


@pytest.mark.parametrize(
    "text",
    [
        "odd = {aten.sum.dim_IntList, aten.mean.dim, aten.t.default}",
        "texts = {'exp': 'exp({0})', 'log': 'log({0})', 'tanh': 'tanh({0})'}",
        "for op in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.mv): ...",
        "names = 'view reshape expand'.split()",
        "if name in ['aten::split', 'aten::chunk', 'aten::unbind']: ...",
    ],
)  # fmt: skip
def test_a_list_of_ops_is_found(text):
    assert [*lists_of_ops(text)] == [1]
