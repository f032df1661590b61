"""A class or function of the user's own where a name of a catalogue may stand: `mine.py:Mine`, or the class itself.

This is the one place that says what such a spec is. In a configuration it is
    {"name": "mine.py:Mine", "code": {"mine.py": SHA-256, ...}, **options}
which names bytes, not a place: `bundles` knows where they are, and whether they may run. A path without digests is the
user's word; it is read from no folder. What has no file (typed into a session) has {"": token} for its code, and is
known to its process alone.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, cast

from dualform import bundles
from dualform.bundles import CodeError, UntrustedCodeError
from dualform.catalogue import Bound, Record, freeze, near_misses

# (where, what the user's name is, options) -> what a record of the kind builds.
Make = Callable[[str, Any, Mapping[str, Any]], Any]
_makers: dict[str, Make] = {}
_live: dict[tuple[str, str], Any] = {}  # (key, name): a class that was passed, rather than its file
_reasons: dict[str, str] = {}  # token: why a class has no file
_records: dict[tuple[str, str, str], OwnRecord] = {}


# A record whose function is in a file of the user's own. Options are as they were given, no default filled in.
@dataclass(frozen=True, eq=False, repr=False)
class OwnRecord(Record):  # pyright: ignore[reportIncompatibleMethodOverride]: __doc__ is per record
    code: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def stamp(self) -> Mapping[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]: per record
        return {"code": dict(self.code)}

    def __call__(self, *args: Any, **options: Any) -> Bound:
        where = f"{self.kind}.{self.name}: option"
        if args:
            raise CodeError(f"{where}s are {args}; expected each by its name. Write {self.name} with option=value.")
        return Bound(self, tuple((key, freeze(f"{where} {key!r}", value)) for key, value in options.items()))

    @property
    def options(self) -> dict[str, Any]:
        return {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _record, (self.kind, self.name, dict(self.code))

    def reduced(self, items: tuple[tuple[str, Any], ...]) -> tuple[Any, ...]:
        return Bound, (self, items)

    def __repr__(self) -> str:
        return f"{self.kind}[{self.name!r}]"


def _record(kind: str, name: str, code: Mapping[str, str]) -> OwnRecord:
    """Return the one record of a name in a bundle, so that equal specs are equal."""
    key = (kind, name, bundles.key_of(code))
    if key not in _records:

        def build(**options: Any) -> Any:
            where = f"{kind}: {name}"
            return _makers[kind](where, _resolved(where, name, code), options)

        _records[key] = OwnRecord(kind, name, build, code=dict(code))
    return _records[key]


def reader(kind: str, make: Make) -> Callable[[Any], Bound | None]:
    """Return what reads specs of own code for a catalogue: a bound record, or None for any other spec."""
    _makers[kind] = make
    return functools.partial(_read, kind)


def _read(kind: str, spec: Any) -> Bound | None:
    name, options = _split(spec)
    if callable(name):
        name, code = _identified(kind, name)
    elif isinstance(name, str) and (is_path(name) or "code" in options):
        code = options.pop("code", None)
        if code is not None:  # as a configuration says it: whether it may run is asked when something is built
            return _record(kind, name, _expected_code(kind, name, code))(**options)
        name, code = _named(kind, name)
    else:
        return None
    made = _record(kind, name, code)(**options)
    made.build()  # the user's word is given: say now what does not fit
    return made


def _split(spec: Any) -> tuple[Any, dict[str, Any]]:
    if isinstance(spec, Bound | Record):
        return None, {}
    if isinstance(spec, functools.partial) and not spec.args:
        return spec.func, dict(spec.keywords)
    if isinstance(spec, Mapping):
        options = dict(cast("Mapping[str, Any]", spec))
        return options.pop("name", None), options
    if isinstance(spec, list | tuple) and len(spec) == 2 and isinstance(spec[1], Mapping):
        return spec[0], dict(spec[1])
    return (spec, {}) if isinstance(spec, str | type) or inspect.isroutine(spec) else (None, {})


def is_path(name: str) -> bool:
    """Is it FILE.py:NAME? (Or nearly: a file without a name is refused as one.)"""
    return bool(re.search(r"\.py(:[^:/\\]*)?$", name))


def _expected_code(kind: str, name: str, code: Any) -> dict[str, str]:
    is_right = isinstance(code, Mapping) and code and all(isinstance(x, str) for x in (*code, *code.values()))
    if not is_right or ("" not in code and name.partition(":")[0] not in code):
        raise CodeError(f"{kind}: {name} has the code {code!r}; expected {{file: SHA-256}}. Save the model again.")
    return dict(code)


def load(kind: str, spec: str) -> Any:
    """Return what FILE.py:NAME is; kind: how errors begin."""
    name, code = _named(kind, spec)
    return _resolved(f"{kind}: {spec}", name, code)


def _named(kind: str, spec: str) -> tuple[str, dict[str, str]]:
    """Read FILE.py:NAME from the disk, which its being named allows."""
    path, _, name = spec.rpartition(":") if not spec.endswith(".py") else (spec, "", "")
    file = Path(path).expanduser()
    if not file.is_file():
        beside = [p.name for p in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise CodeError(f"{kind}: there is no file {file.absolute()}. {near_misses(file.name, beside)}")
    bundles.expect_plain(file.name)
    files = bundles.read(file.resolve() if file.resolve().name == file.name else file.absolute())
    key = bundles.keep(files, file.absolute().parent)
    bundles.allow(key, remember=True)
    found = f"{file.name}:{name}"
    _resolved(f"{kind}: {spec}", found, bundles.digests(files))
    return found, bundles.digests(files)


def _resolved(where: str, name: str, code: Mapping[str, str]) -> Any:
    """Return the class or function of a name, its file run if it has not been."""
    key = bundles.key_of(code)
    if (key, name) in _live:
        return _live[key, name]
    if "" in code:
        raise CodeError(
            f"{where} was made in a session, and its source was not saved ({name.rpartition(':')[2]} is a name there); "
            "expected the class. Pass it: from_pretrained(folder, learner=...)."
        )
    file, _, attribute = name.rpartition(":")
    if not bundles.is_allowed(code):
        raise UntrustedCodeError(
            f"{where} is code that came with a model and would run here: {bundles.described(code)}; expected your word "
            "for it. Read it, then pass --trust-code (in Python: from_pretrained(folder, trust_remote_code=True))."
        )
    module = _imported(where, f"{bundles.PREFIX}{key}.{file.removesuffix('.py')}", list(code))
    found = getattr(module, attribute, None) if attribute else None
    if found is None:
        own = [n for n, x in vars(module).items() if n[0] != "_" and getattr(x, "__module__", "") == module.__name__]
        what = f"{file} has no {attribute!r}" if attribute else f"{file} is named without what in it is meant"
        advice = near_misses(attribute, own) if attribute else f"Write {file}:{(own or ['NAME'])[-1]}."
        raise CodeError(f"{where}: {what}. {advice}")
    if not _is_defined_in(found, f"{bundles.PREFIX}{key}."):
        # With options of a folder's choice, what a known file only imports could be made to do anything.
        home = getattr(found, "__module__", type(found).__name__)
        raise CodeError(
            f"{where} is not defined in {file}, which has it from {home}; expected a name of the file's own. Derive a "
            "class of yours from it there."
        )
    return found


def _is_defined_in(found: Any, package: str) -> bool:
    """Is it a bundle's own class or function, a partial of one, or a value, as a Rule is?"""
    while isinstance(found, functools.partial):
        found = found.func
    home = getattr(found, "__module__", None) or ""
    is_value = not callable(found) or not (isinstance(found, type) or inspect.isroutine(found))
    return home.startswith(package) or (is_value and (not callable(found) or home.startswith(("dualform.", "torch."))))


def _imported(where: str, module: str, names: list[str]) -> Any:
    try:
        return importlib.import_module(module)
    except CodeError:
        raise
    except Exception as error:  # the file is the user's: whatever it raises is what is to be said
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename).name in names]
        at = f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else names[0]
        raise CodeError(
            f"{where} cannot be imported: {at} raises {type(error).__name__}: {error}. "
            "Mend it, or install what it needs."
        ) from error


def _identified(kind: str, found: Any) -> tuple[str, dict[str, str]]:
    """Name a class or function that was passed by its file; or by the session, and why."""
    qualified = str(getattr(found, "__qualname__", getattr(found, "__name__", found)))
    module = sys.modules.get(found.__module__ or "")
    top, _, stem = (found.__module__ or "").partition(".")
    if top.startswith(bundles.PREFIX):
        code = bundles.digests(bundles._files[top.removeprefix(bundles.PREFIX)])
        return f"{stem}.py:{qualified}", code
    try:
        file = Path(inspect.getsourcefile(found) or "")
        if not file.is_file() or file.suffix != ".py" or module is None:
            raise CodeError("it was typed into a session")
        if getattr(module, qualified, None) is not found:
            raise CodeError("it is made inside a function or another class")
        bundles.expect_plain(file.name)
        files = bundles.read(file)
        if module.__name__ == "__main__":
            _expect_harmless(file, files[file.name])
        _expect_unchanged(file, files[file.name], found)
    except (CodeError, OSError, TypeError) as error:
        return _of_session(qualified, found, str(error))
    key = bundles.keep(files, file.parent)
    bundles.allow(key, remember=True)
    _live[key, f"{file.name}:{qualified}"] = found
    return f"{file.name}:{qualified}", bundles.digests(files)


def _of_session(qualified: str, found: Any, reason: str) -> tuple[str, dict[str, str]]:
    for (key, name), other in _live.items():
        if other is found and key in _reasons:
            return name, {"": _reasons_token[key]}
    token, name = uuid.uuid4().hex, f"session:{qualified}"
    key = bundles.key_of({"": token})
    _live[key, name], _reasons[key], _reasons_token[key] = found, reason, token
    return name, {"": token}


_reasons_token: dict[str, str] = {}


def _expect_harmless(file: Path, data: bytes) -> None:
    """Refuse a script whose import would do what it does: definitions may stand in it, and what a guard holds back."""
    ast = bundles.ast
    for node in bundles.parsed(file, data).body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef):
            continue
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            continue
        value = getattr(node, "value", None) if isinstance(node, ast.Assign | ast.AnnAssign | ast.Expr) else node
        try:
            ast.literal_eval(cast("Any", value))
        except ValueError:
            raise CodeError(f"{file.name} is the script that runs, whose line {node.lineno} would run again") from None


def _expect_unchanged(file: Path, data: bytes, found: Any) -> None:
    """Refuse a file that does not hold the code that is in memory."""
    held = {code.co_qualname: code for code in _codes(compile(data, str(file), "exec", dont_inherit=True))}
    own = (
        [found] if isinstance(found, FunctionType) else [x for x in vars(found).values() if isinstance(x, FunctionType)]
    )
    for function in own:
        code = function.__code__
        if Path(code.co_filename).name == file.name and held.get(code.co_qualname) != code:
            raise CodeError(f"{file} is not what it was when {found.__qualname__} was imported from it")


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def codes_in(document: Any) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield every name with its bundle in what a configuration holds, nested specs too."""
    if isinstance(document, Mapping):
        name, code = document.get("name"), document.get("code")
        if isinstance(name, str) and isinstance(code, Mapping):
            yield name, _expected_code("code", name, code)
        for value in document.values():
            yield from codes_in(value)
    elif isinstance(document, list | tuple):
        for value in document:
            yield from codes_in(value)


def expect_no_paths(where: str, specs: Mapping[str, Any]) -> None:
    """Refuse what a folder holds if it names a file of this machine's: no folder may have one run."""
    for key, value in specs.items():
        parts = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else []
        name = value.get("name") if isinstance(value, Mapping) and "code" not in value else None
        for spec in (*parts, name):
            if isinstance(spec, str) and is_path(spec):
                raise CodeError(
                    f"{where}: {key} is {spec!r}, a file's name without its digest; expected what save_pretrained "
                    f"writes. If you mean a file of yours, pass it: {key}={spec!r}."
                )
        if isinstance(value, Mapping):
            expect_no_paths(where, {f"{key}.{name}": part for name, part in value.items() if name != "name"})


def unsaved(document: Any) -> list[str]:
    """Say of what in a configuration no file can be saved, and why."""
    found = []
    for name, code in codes_in(document):
        if "" in code:
            reason = _reasons.get(bundles.key_of(code), "it was made in another session")
            found.append(f"{name.rpartition(':')[2]} ({reason})")
    return found


def expect_options(where: str, function: Callable[..., Any], given: int, options: Mapping[str, Any], call: str) -> None:
    """Refuse options that a class or function does not take after `given` arguments, and say which it needs."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of what is written in C
        return
    kinds = inspect.Parameter
    named = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is kinds.VAR_KEYWORD for p in signature.parameters.values())
    known = [p.name for p in named if p.kind is p.KEYWORD_ONLY] + [
        p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
    ][given:]
    for wrong in [] if takes_any else [name for name in options if name not in known]:
        raise CodeError(f"{where}: unknown option {wrong!r}. {near_misses(wrong, known)}")
    try:
        signature.bind(*[None] * given, **options)
    except TypeError as error:
        raise CodeError(
            f"{where} takes {signature}, and {error}; expected {call}. Give it such parameters, or pass the others as "
            f"options: {{'name': {where.partition(': ')[2]!r}, 'option': value}}."
        ) from None


__all__ = [
    "CodeError",
    "UntrustedCodeError",
    "codes_in",
    "expect_no_paths",
    "expect_options",
    "is_path",
    "load",
    "reader",
    "unsaved",
]
