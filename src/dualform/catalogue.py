"""The one registry: a name and its options are a value, and what they build is found by looking the name up.

learners = Catalogue("learners")

@learners.record(name="MLP", formula="x W1 ... Wn", source="Sun et al. 2024, 2.7")
def mlp(depth=2, expand=4): ...          # options are the keyword parameters; returns dim -> nn.Module

learners.MLP(depth=3)                    # a bound record: frozen, hashable, JSON-able
learners.MLP(depth=3)(64)                # what mlp(depth=3)(64) returns
learners.build({"name": "mlp", "depth": 3})
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import import_module
from numbers import Integral, Real
from types import MappingProxyType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Never, TypeVar, Union, cast, get_args, get_origin

from dualform.shapes import shown

F = TypeVar("F", bound=Callable[..., Any])


class CatalogueError(ValueError):
    """A record, an option or a spec that the catalogue cannot use."""


class UnknownNameError(CatalogueError, AttributeError):
    """A name that the catalogue does not hold; the message lists its neighbours."""


def normalise(name: str) -> str:
    """Reduce a name to what its spellings share: `LowRank`, `low_rank` and `low-rank` are one name.

    Example:
        >>> normalise("Low-Rank") == normalise("low_rank")
        True
    """
    return re.sub(r"[^a-z0-9]", "", name.lower())


def near_misses(wrong: str, known: list[str], others: Mapping[str, str] | None = None) -> str:
    """Say what `wrong` may have meant, as the tail of an error message; others: names of what is written otherwise."""
    by_key = {normalise(name): name for name in known}
    by_key = {normalise(name): text for name, text in (others or {}).items()} | by_key
    close = difflib.get_close_matches(normalise(wrong), by_key, n=3, cutoff=0.5)
    if close:
        return "Did you mean " + " or ".join(repr(by_key[key]) for key in close) + "?"
    return f"Known: {', '.join(known)}." if known else "There are none."


def expect(
    where: str, name: str, value: Any, hint: Any, advice: str = "Change it.", kind: type[ValueError] = ValueError
) -> None:
    """Refuse a value that does not fit an annotation, which may say a range too, as Annotated[int, Ge(1)] does.

    Numbers are finite, and True is none; a whole number is a float's value as well.
    Raises: `kind`, with what is wrong and what is expected.
    Example:
        >>> expect("train", "max_steps", 3, int)
        >>> expect("train", "max_steps", True, int)
        Traceback (most recent call last):
        ValueError: train: max_steps is True; expected a value of type int. Change it.
    """
    plain = (int, float) if hint is float else (hint,) if hint in (bool, int, str) else ()
    is_named = get_origin(hint) is Literal and (type(value), value) in [(type(x), x) for x in get_args(hint)]
    if hint is Any or is_named or (type(value) in plain and (hint is str or abs(value) < 1e300)):
        return
    from pydantic import ValidationError  # a tenth of a second, and most values are plainly right

    try:
        _checker(hint).validate_python(value)
    except ValidationError as error:
        wrong = error.errors(include_url=False)
        deepest = max(wrong, key=lambda e: sum(isinstance(part, int) for part in e["loc"]))
        place, found = "".join(f"[{part}]" for part in deepest["loc"] if isinstance(part, int)), deepest["input"]
        rules = dict.fromkeys(e["msg"].partition("Input should be ")[2] for e in wrong if e["input"] is found)
        says_more = ("literal", "finite", "greater", "less", "multiple")
        if not all(rules) or not (place or deepest["type"].startswith(says_more)):
            rules = [f"a value of type {type_name(hint)}"]
        choices = [str(choice) for choice in get_args(hint)] if get_origin(hint) is Literal else []
        if normalise(str(found)) in map(normalise, choices):
            advice = near_misses(str(found), choices)
        raise kind(f"{where}: {name}{place} is {found!r}; expected {' or '.join(rules)}. {advice}") from None


def type_name(hint: Any) -> str:
    """Write an annotation as people say it: `int or None`, `Sequence[float]`."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(type_name, get_args(hint)))
    if get_origin(hint) is Annotated:
        return type_name(get_args(hint)[0])
    return re.sub(r"\b\w+\.", "", inspect.formatannotation(hint)).replace("NoneType", "None")


@cache
def _checker(hint: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True))


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return what a function says its parameters are, names looked up in its module; Any where it says nothing."""
    module, found = sys.modules.get(function.__module__), dict[str, Any]()
    names = dict(vars(module)) if module else {}
    for name, parameter in inspect.signature(function).parameters.items():
        hint = Any if parameter.annotation is parameter.empty else parameter.annotation
        try:
            found[name] = eval(hint, names) if isinstance(hint, str) else hint
        except (NameError, AttributeError):  # a type that is made elsewhere, or for type checkers only
            found[name] = Any
    return found


class FrozenMapping(Mapping[str, Any]):
    """A hashable mapping, for options that are dictionaries."""

    def __init__(self, items: Mapping[str, Any]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


def freeze(where: str, value: Any) -> Any:
    """Return an option as a value that hashes."""
    if value is None or isinstance(value, (bool, int, float, str, Bound, FrozenMapping)):
        return value
    if isinstance(value, Integral):  # numpy's numbers, as a grid search draws them
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, (list, tuple)):
        return tuple(freeze(where, item) for item in cast("Sequence[Any]", value))
    if isinstance(value, Mapping):
        items = cast("Mapping[str, Any]", value).items()
        return FrozenMapping({str(key): freeze(where, item) for key, item in items})
    if callable(value):
        return value
    raise CatalogueError(
        f"{where} is a {type(value).__name__}; expected a number, string, list, mapping, spec or callable. "
        "Tensors and other objects are arguments of what the record builds, not its options."
    )


def _thaw(where: str, value: Any) -> Any:
    if isinstance(value, Bound):
        return value.to_json()
    if isinstance(value, tuple):
        return [_thaw(where, item) for item in cast("tuple[Any, ...]", value)]
    if isinstance(value, FrozenMapping):
        return {key: _thaw(where, item) for key, item in value.items()}
    if callable(value):
        raise CatalogueError(
            f"{where} is the Python object {value!r}, which JSON cannot hold; expected the name of a record. "
            "Register it in the catalogue with `record` to save it."
        )
    return value


@dataclass(frozen=True, eq=False)
class Record:
    """One variant: its name, its formula, its source, and the function that builds it from options."""

    kind: str
    name: str
    function: Callable[..., Any]
    formula: str = ""
    source: str = ""
    domain: str = ""
    aliases: tuple[str, ...] = ()
    nested: Mapping[str, Catalogue | tuple[Catalogue]] = field(
        default_factory=dict[str, "Catalogue | tuple[Catalogue]"]
    )

    @cached_property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.function)

    @cached_property
    def hints(self) -> dict[str, Any]:
        """What the function says each option is."""
        return hints_of(self.function)

    @property
    def options(self) -> dict[str, Any]:
        """Option names with their defaults (`inspect.Parameter.empty` where one must be given)."""
        return {name: parameter.default for name, parameter in self.signature.parameters.items()}

    @property
    def __doc__(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]: per record, not per class
        parts = (inspect.getdoc(self.function), self.formula, self.source and f"Source: {self.source}")
        return "\n\n".join(filter(None, parts)) or None

    def __call__(self, *args: Any, **options: Any) -> Bound:
        known = list(self.signature.parameters)
        for wrong in options.keys() - set(known):
            raise CatalogueError(f"{self.kind}.{self.name}: unknown option {wrong!r}. {near_misses(wrong, known)}")
        try:
            bound = self.signature.bind(*args, **options)
        except TypeError as error:
            raise CatalogueError(f"{self.kind}.{self.name}: {error}; expected {self.name}{self.signature}.") from None
        bound.apply_defaults()
        made = Bound(self, tuple((key, self._option(key, value)) for key, value in bound.arguments.items()))
        made.build()  # the function checks the values of its options; let it do so now
        return made

    def _option(self, key: str, value: Any) -> Any:
        where, inner = f"{self.kind}.{self.name}", self.nested.get(key)
        if isinstance(inner, tuple):
            if isinstance(value, (list, tuple)):
                return tuple(inner[0].build(part) for part in cast("Sequence[Any]", value))
            raise CatalogueError(f"{where}: option {key!r} is {value!r}; expected a list of specs.")
        is_left_out = value is None and self.options[key] is None
        is_spec = isinstance(value, Bound) or not callable(value) or (inner is not None and inner.reads(value))
        if inner is not None and not is_left_out and is_spec:
            return inner.build(value)
        frozen = freeze(f"{where}: option {key!r}", value)
        expect(where, key, frozen, self.hints[key], self._advice(key), CatalogueError)
        return frozen

    def _advice(self, key: str) -> str:
        default = self.options[key]
        return "Pass one." if default is inspect.Parameter.empty else f"Leave it out for {default!r}."

    def __reduce__(self) -> tuple[Any, ...]:
        # The module goes with it, to be imported, and its records registered, where this is read.
        return _record, (self.function.__module__, self.kind, self.name)

    stamp: ClassVar[Mapping[str, Any]] = MappingProxyType({})  # what else than its name JSON says of a record

    def reduced(self, items: tuple[tuple[str, Any], ...]) -> tuple[Any, ...]:
        """How a pickle makes the record with its options again."""
        return _restore, (self.function.__module__, self.kind, self.name, items)

    def __repr__(self) -> str:
        return f"{self.kind}.{self.name}{self.signature}"


@dataclass(frozen=True, repr=False)
class Bound:
    """A record with its options: a frozen value that hashes, compares, prints as code and goes to JSON and back.

    Calling it calls what it builds; attributes it lacks are those of what it builds. What a record builds is
    made once and shared, so a record's function must return something immutable (a function, a frozen dataclass).
    """

    record: Record
    items: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.items)

    @cached_property
    def _built(self) -> Any:
        return self.record.function(**self.options)

    def build(self) -> Any:
        return self._built

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._built(*args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):
            raise AttributeError(attribute)
        return getattr(self._built, attribute)

    def to_json(self) -> dict[str, Any]:
        """Return `{"name": ..., **options}` of plain JSON values, every option present."""
        where = f"{self.record.kind}.{self.name}: option"
        options = {key: _thaw(f"{where} {key!r}", value) for key, value in self.items}
        return {"name": self.name, **self.record.stamp, **options}

    def __reduce__(self) -> tuple[Any, ...]:
        return self.record.reduced(self.items)

    def __copy__(self) -> Bound:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Bound:
        return self

    def __repr__(self) -> str:
        defaults = {key: inspect.Parameter.empty for key, _ in self.items} | self.record.options
        shown = [f"{key}={value!r}" for key, value in self.items if value != defaults[key]]
        name = f".{self.name}" if self.name.isidentifier() else f"[{self.name!r}]"
        return f"{self.record.kind}{name}({', '.join(shown)})"


def _record(module: str, kind: str, name: str) -> Record:
    import_module(module)
    return _of_kind[kind][name]


def _restore(module: str, kind: str, name: str, items: tuple[tuple[str, Any], ...]) -> Bound:
    return _record(module, kind, name)(**dict(items))


_of_kind: dict[str, Catalogue] = {}


class Catalogue:
    """Named records of one kind, found by any spelling of their names.

    outside: reads specs that name no record of its own, as `own_code.reader` does; None for any other.
    Raises: UnknownNameError for a name it lacks, CatalogueError for a duplicate, an unknown option or a bad spec.
    Example:
        >>> shapes = Catalogue("shapes")
        >>> @shapes.record(name="Ball", formula="|x| < r")
        ... def ball(radius=1.0):
        ...     return lambda x: abs(x) < radius
        >>> shapes.ball(radius=2.0), shapes["BALL"](2.0)(1.5)
        (shapes.Ball(radius=2.0), True)
        >>> shapes.build({"name": "ball"}) == shapes.Ball()
        True
    """

    def __init__(self, kind: str, outside: Callable[[Any], Bound | None] | None = None) -> None:
        self.kind, self._outside = kind, outside
        _of_kind[kind] = self
        self._records: dict[str, Record] = {}
        self._keys: dict[str, str] = {}

    def record(
        self, *, name: str | None = None, suffix: str = "", formula: str = "", source: str = "", domain: str = "",
        aliases: tuple[str, ...] = (), nested: Mapping[str, Catalogue | tuple[Catalogue]] | None = None,
    ) -> Callable[[F], F]:  # fmt: skip
        """Register the decorated function or dataclass; its parameters are the record's options.

        name: default the function's own; suffix: what makes of it the first alias. nested: the options that are specs
        themselves, and the catalogue each belongs to; (catalogue,) for a list of specs.
        """

        def register(function: F) -> F:
            called = function.__name__ if name is None else name
            others = (f"{called}{suffix}", *aliases) if suffix else tuple(aliases)
            made = Record(self.kind, called, function, formula, source, domain, others, dict(nested or {}))
            self._check_options(made)
            keys = {normalise(spelling): spelling for spelling in (called, *others)}
            for key, spelling in keys.items():
                if key in self._keys:
                    raise CatalogueError(f"{self.kind}: {spelling!r} is already the name of {self._keys[key]!r}.")
                if not key or hasattr(type(self), spelling) or spelling == "kind":
                    raise CatalogueError(f"{self.kind}: {spelling!r} cannot name a record. Choose another name.")
            self._records[called] = made
            self._keys.update(dict.fromkeys(keys, called))
            return function

        return register

    def _check_options(self, made: Record) -> None:
        variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        for parameter in made.signature.parameters.values():
            if parameter.kind in variadic or parameter.name == "name":
                raise CatalogueError(
                    f"{self.kind}.{made.name}: parameter {parameter} cannot be an option; "
                    "expected parameters with names of their own, none called 'name'."
                )
        for wrong in made.nested.keys() - made.options.keys():
            raise CatalogueError(f"{self.kind}.{made.name}: nested option {wrong!r} is not a parameter.")

    def names(self) -> tuple[str, ...]:
        return tuple(self._records)

    def build(self, spec: Any) -> Bound:
        """Make a bound record of a bound record, a name, `(name, options)` or `{"name": ..., **options}`."""
        if isinstance(spec, Bound):
            is_own = spec.record.kind == self.kind and bool(spec.record.stamp)
            if not is_own and self._records.get(spec.name) is not spec.record:
                raise CatalogueError(f"{self.kind}.build: {spec!r} belongs to the catalogue {spec.record.kind!r}.")
            return spec
        if self._outside is not None and (found := self._outside(spec)) is not None:
            return found
        if isinstance(spec, str):
            return self[spec]()
        if isinstance(spec, Mapping):
            options = dict(cast("Mapping[str, Any]", spec))
            name = options.pop("name", None)
            if isinstance(name, str):
                return self[name](**options)
        if isinstance(spec, (list, tuple)):
            parts = cast("Sequence[Any]", spec)
            if len(parts) == 2 and isinstance(parts[0], str) and isinstance(parts[1], Mapping):
                return self[parts[0]](**cast("Mapping[str, Any]", parts[1]))
        expected = 'a bound record, a name, (name, {options}) or {"name": ..., options}'
        advice = f"Call it: {spec.name}()." if isinstance(spec, Record) else f"Known names: {', '.join(self.names())}."
        raise CatalogueError(f"{self.kind}.build: {shown(spec)} is not a spec; expected {expected}. {advice}")

    def reads(self, value: Any) -> bool:
        """May a class or function itself stand for a spec here?"""
        return self._outside is not None and (isinstance(value, type) or inspect.isroutine(value))

    def __getitem__(self, name: str) -> Record:
        key = self._keys.get(normalise(str(name)))
        return self._records[key] if key is not None else self._unknown(str(name))

    def __getattr__(self, name: str) -> Record:
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def _unknown(self, name: str) -> Never:
        raise UnknownNameError(f"{self.kind}: no record is called {name!r}. {near_misses(name, list(self._records))}")

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and normalise(name) in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._records]

    def __repr__(self) -> str:
        return f"Catalogue({self.kind!r}: {', '.join(self._records)})"
