"""Coming from tinyBIG 0.2.1: its class names, its keyword names, its calling conventions, on this library's functions.

    from_tinybig("taylor_expansion", d=2)(x)        from_tinybig("lorr_reconciliation", r=2)(n=4, D=9, w=w)

Where tinyBIG computes something else than it documents, the documented mathematics holds and `TinybigDefect` is warned.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from dualform.catalogue import Bound, Catalogue, CatalogueError, Record, UnknownNameError, near_misses
from dualform.functions import patches, polynomials
from dualform.functions.basis import Expansion
from dualform.functions.expansions import expansions
from dualform.functions.fusions import fusions, metrics
from dualform.functions.reconciliations import reconciliations
from dualform.functions.remainders import activations, remainders
from dualform.shapes import fail

Map = Callable[[Tensor], Tensor]


class TinybigDefect(UserWarning):
    """What this returns differs from what tinyBIG 0.2.1 computes, which differs from what it documents."""


# tinyBIG's class -> how its values are wrong.
defects = {
    "laguerre_expansion": "its recurrence starts from x + 1 + alpha; the polynomial is 1 + alpha - x",
    "beta_wavelet_expansion": "it squashes the whole batch if one tau is outside [0, 1]; the density is 0 there",
    "shannon_wavelet_expansion": "it gives NaN at tau = 0; the limit is 1",
    "meyer_wavelet_expansion": "it computes the scaling function, with NaN at +-3/4; part='scaling' is that one, "
    "finite",
    "harr_wavelet_expansion": "its values are these, but it can pass no gradient on; Haar's is 0 where it exists",
    "combinatorial_expansion": "it returns nested lists of subsets; here they are one row of features",
    "masking_reconciliation": "its mask is not saved and its w has n D entries; "
    "here the mask is seeded and w has p n D",
    "duplicated_padding_reconciliation": "it repeats the entries of w one by one; the tiling is 1_(p x q) (x) w",
    "hm_reconciliation": "it reshapes the outer product of the flat factors; the Kronecker product is A (x) B",
    "lphm_reconciliation": "it reshapes the outer product of the flat factors; the Kronecker product is A (x) (S T)",
    "dual_lphm_reconciliation": "it reshapes the outer product of the flat factors; the product is (P Q) (x) (S T)",
    "hypernet_reconciliation": "its net is drawn unseeded at the first call, unscaled; here it is seeded and scaled",
    "random_matrix_adaption_reconciliation": "its A and B are not saved; here they are drawn from `seed`",
    "random_matrix_hypernet_reconciliation": "its matrices are not saved nor scaled; here they are drawn from `seed`",
    "parameterized_weighted_summation_fusion": "it raises for more than one input",
}
defects |= {
    f"{kind}_parameterized_concatenation_fusion": defects[f"{kind}_reconciliation"]
    for kind in ("hm", "lphm", "dual_lphm", "random_matrix_adaption")
}

# tinyBIG's keyword -> ours; the first that the record has is meant.
keywords = {
    "d": ("degree",), "r": ("rank",), "P": ("period",), "N": ("order",), "t": ("cells", "shifts"), "s": ("scales",),
    "a": ("dilation",), "b": ("translation",), "num_interval": ("count",), "base": ("centres",),
    "base_range": ("span",), "grid_range": ("span",), "pre_C": ("pre",), "post_C": ("post",),
    "composition_functions": ("functions",), "composition_function_configs": ("functions",),
    "activation_functions": ("activation",), "activation_function_configs": ("activation",), "enable_bias": ("bias",),
}  # fmt: skip
# Keywords that say nothing here: names, places, what a class always is, and what only its subclasses read.
silent = {"name", "device", "require_parameters", "enable_bias", "static", "fixed_mask"}
around = {"preprocess_functions": "before", "postprocess_functions": "after"}
around |= {"preprocess_function_configs": "before", "postprocess_function_configs": "after"}


def from_tinybig(name: str, /, **kwargs: Any) -> Migrated:
    """Build tinyBIG's class `name` from its own keywords, to be called in its way or in ours.

    Shape:  expansions (b, m) -> (b, D); reconciliations w (l,) or (1, l) -> (n, D); remainders (..., n); fusions ours.
    Dtype:  the input's: float64 stays float64.
    Raises: UnknownNameError for no class, or one of a later issue; CatalogueError for a keyword that it lacks.
    Source: tinyBIG 0.2.1. Differs: where `defects` says so, with a warning; keywords it would drop silently are errors.
    Example:
        >>> import torch
        >>> psi = from_tinybig("lorr_reconciliation", r=1)
        >>> psi.calculate_l(n=2, D=3), psi(n=2, D=3, w=torch.ones(1, 5)).shape
        (5, torch.Size([2, 3]))
    """
    catalogue, record, own = _find(name)
    if own in defects:
        warnings.warn(TinybigDefect(f"{own}: {defects[own]}."), stacklevel=2)
    maps = {
        side: [f for key in around if around[key] == side for f in _maps(own, kwargs.pop(key, None))]
        for side in ("before", "after")
    }
    dims = kwargs.pop("dims", None) if catalogue is fusions else None
    kwargs = _patch_options(own, kwargs) if record.function.__module__ == patches.__name__ else kwargs
    if own == "combinatorial_normal_expansion" and kwargs.pop("with_replacement", False):
        warnings.warn(TinybigDefect(f"{own}: it ignores with_replacement; so does this."), stacklevel=2)
    if own == "weighted_summation_fusion" and kwargs.get("weights") is None:
        kwargs.pop("weights", None)
        record = fusions["parameterized_weighted_summation"]
    if catalogue is fusions and kwargs.get("q") is None and "p" in kwargs:
        kwargs["q"] = kwargs["p"]  # as its fusions do; its reconciliations look for a factor of their own
    known = record.options.keys()
    mute = {key for key in silent if known.isdisjoint((key, *keywords.get(key, ())))}
    options = dict(_option(own, record, key, value) for key, value in kwargs.items() if key not in mute)
    if options.get("degree") == 0 and record.function.__module__ == polynomials.__name__:
        made: Any = Expansion(record.name, lambda x: x[..., :0], lambda m: 0, "0")
    elif record.name in ("extended", "nested") and catalogue is expansions:
        made = record.function(**options)  # parts may be expansions with maps around them, which no record holds
    else:
        made = record(**options)
    return _conventions[catalogue.kind](made, tuple(maps["before"]), tuple(maps["after"]), dims)


def _find(name: str) -> tuple[Catalogue, Record, str]:
    """Find the record of a class by its name, with or without its module."""
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]: the public border
        fail("from_tinybig", "name", f"is {name!r}", "the name of a class, a string", "Pass 'taylor_expansion'.")
    short = name.rpartition(".")[2]
    families = {"expansion": expansions, "reconciliation": reconciliations, "remainder": remainders, "fusion": fusions}
    catalogue = families.get(short.rpartition("_")[2])
    if catalogue is not None and short in catalogue:
        return catalogue, catalogue[short], short
    aliases = [alias for c in families.values() for n in c for alias in c[n].aliases]
    known = [alias for alias in aliases if alias.rpartition("_")[2] in families]
    raise UnknownNameError(
        f"from_tinybig: {name!r} is no expansion, reconciliation, remainder or fusion of tinyBIG. "
        f"{near_misses(short, known)} Its interdependences, compressions, heads, layers and models wait for a later "
        "issue."
    )


def _option(own: str, record: Record, key: str, value: Any) -> tuple[str, Any]:
    ours = next((name for name in keywords.get(key, ()) if name in record.options), key)
    if ours not in record.options:
        theirs = [k for k, names in keywords.items() if any(n in record.options for n in names)]
        raise CatalogueError(f"{own}: unknown keyword {key!r}. {near_misses(key, sorted({*theirs, *record.options}))}")
    if ours == "functions":
        parts = value if isinstance(value, (list, tuple)) else list(value.values()) if _is_named(value) else [value]
        return ours, tuple(_part(part) for part in parts)
    if ours == "activation":
        return ours, _activation(own, value)
    if ours == "metric":
        return ours, _metric(value)
    return ours, _numbers(value)


def _numbers(value: Any) -> Any:
    if hasattr(value, "tolist"):  # a tensor or an array: a float64 survives as a Python number
        value = value.tolist()
    return tuple(_numbers(v) for v in value) if isinstance(value, (list, tuple)) else value


def _is_named(value: Any) -> bool:
    return isinstance(value, Mapping) and not {"function_class", "__class__"} & value.keys()


def _part(value: Any) -> Any:
    """Read one function of a composition: an object of ours, a class with its keywords, or a configuration."""
    if isinstance(value, ExpansionLike):
        return value.expansion
    if isinstance(value, (Bound, Expansion)):
        return value
    if isinstance(value, Mapping):
        name = value.get("__class__", value.get("function_class"))
        return from_tinybig(str(name), **value.get("kwargs", value.get("function_parameters", {}))).expansion
    return expansions.build(value)


def _maps(own: str, value: Any) -> list[Any]:
    """Read process functions: callables, names ("torch.nn.functional.tanh", "tanh"), configurations, lists of these."""
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return [f for part in value for f in _maps(own, part)]
    if isinstance(value, Mapping):
        path = str(value.get("__torch__", value.get("function_class", value.get("__class__"))))
        return [_torch(own, path)(**value.get("kwargs", value.get("function_parameters", {})))]
    if isinstance(value, str):
        found = _torch(own, value)
        return [found() if isinstance(found, type) else found]
    if not callable(value):
        raise CatalogueError(
            f"{own}: {value!r} is no function; expected a callable or a name below torch.nn.functional."
        )
    return [value]


def _torch(own: str, path: str) -> Any:
    parts = path.removeprefix("torch.").split(".")
    start: Any = torch if len(parts) > 1 or hasattr(torch, parts[0]) else torch.nn.functional
    try:
        found = reduce(getattr, parts if len(parts) > 1 else [path.lower()], start)
    except AttributeError:
        found = None
    if not callable(found) or parts[-1].lower().startswith(("dropout", "batchnorm", "batch_norm")):
        raise CatalogueError(
            f"{own}: {path!r} is not a function of x alone; expected a name such as 'torch.nn.functional.tanh'. "
            "Dropout and batch norm are modules with a state: put them into your model."
        )
    return found


@dataclass(frozen=True)
class Chain:
    """Functions one after another, as one that compares by them."""

    functions: tuple[Map, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return reduce(lambda y, f: f(y), self.functions, x)


def _activation(own: str, value: Any) -> Any:
    if isinstance(value, str) and value in activations:
        return value
    functions = tuple(_maps(own, value))
    return Chain(functions) if functions else "identity"


def _metric(value: Any) -> Any:
    """Read a metric of tinyBIG, a name or a function (N, k) -> (N,), as one over a stacked list (k, ..., n)."""
    name = value.get("__fn__", "") if isinstance(value, Mapping) else value
    name = name if isinstance(name, str) else getattr(name, "__name__", "")
    short = name.rpartition(".")[2].removeprefix("batch_").replace("variance", "var")
    if short in metrics or not callable(value):
        return short
    per_row: Any = value
    return lambda stacked: per_row(stacked.movedim(0, -1).flatten(0, -2)).view(stacked.shape[1:])


_root = math.sqrt
# The distance of patch centres along h, w, d of each packing, in units of p (its sizes per axis, or its radius).
packings: dict[str, dict[str, tuple[float, ...]]] = {
    "cuboid": {"sparse_square": (3, 3, 3), "complete_square": (2, 2, 2), "dense_square": (1, 1, 1)},
    "cylinder": {
        "sparse_square": (2, 2, 2), "complete_square": (_root(2), _root(2), 2),
        "sparse_hexagonal": (_root(3), 2, 2), "complete_hexagonal": (1.5, _root(3), 2),
        "dense_hexagonal": (0.5 * _root(6), _root(2), 1), "denser_hexagonal": (0.5 * _root(3), 1, 1),
    },
    "sphere": {
        "sparse_simple_cubic": (2, 2, 2), "complete_simple_cubic": (0.6667 * _root(3),) * 3,
        "dense_simple_cubic": (1, 1, 1),
        "sparse_face_centered_cubic": (2, _root(3), 0.6667 * _root(6)),
        "complete_face_centered_cubic": (_root(2), 0.6667 * _root(6), 1.3333),
        "dense_face_centered_cubic": (1, 1, 1), "sparse_hexagonal": (2, 2, _root(6)),
        "complete_hexagonal": (0.6667 * _root(3), 0.6667 * _root(3), 1), "dense_hexagonal": (1, 1, 1),
    },
}  # fmt: skip


def _read(value: Any, fields: Iterable[str]) -> dict[str, Any]:
    """Read the fields of a geometric object: one of tinyBIG's, or a configuration of one."""
    if isinstance(value, Mapping):
        nested = [v for key, v in value.items() if key == "kwargs" or key.endswith("_parameters")]
        value = nested[0] if nested else value
        return {name: value[name] for name in fields if name in value}
    return {name: getattr(value, name) for name in fields if getattr(value, name, None) is not None}


def _patch_options(own: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Turn tinyBIG's grid, patch and packing into the options of a patch record."""
    kwargs = dict(kwargs)
    sizes = ("p_h", "p_w", "p_d", "p_h_prime", "p_w_prime", "p_d_prime", "p_r")
    grid = kwargs.pop("grid", None) or kwargs.pop("grid_configs", None)
    grid = grid or {k: kwargs.pop(k) for k in "hwd" if k in kwargs}
    grid = {"d": 1, "universe_num": 1} | _read(grid, ("h", "w", "d", "universe_num"))
    patch = kwargs.pop("patch", None) or kwargs.pop("patch_configs", None)
    p = _read(patch, sizes) if patch is not None else {k: kwargs.pop(k) for k in sizes if k in kwargs}
    if not {"h", "w"} <= grid.keys() or not ({"p_r"} <= p.keys() or {"p_h", "p_w"} <= p.keys()):
        raise CatalogueError(
            f"{own}: grid or patch is missing; expected grid (h, w, d) and p_h, p_w, p_d or p_r. Pass both."
        )
    p = {k: v for k, v in p.items() if v is not None}
    if "p_r" not in p:
        shape, unit = "cuboid", (p["p_h"], p["p_w"], p.get("p_d", 0))
        after = tuple(p.get(f"p_{axis}_prime", size) for axis, size in zip("hwd", unit, strict=True))
        own_options: dict[str, Any] = {"before": unit, "after": after}
        offsets = patches.box(unit, after)
    elif "p_d" in p:
        shape, unit = "cylinder", (p["p_r"], p["p_r"], p["p_d"])
        own_options = {"radius": p["p_r"], "depth": p.get("p_d_prime", p["p_d"])}  # tinyBIG: -p_d' .. p_d'
        offsets = patches.ball(**own_options, flat=True)
    else:
        shape, unit = "sphere", (p["p_r"],) * 3
        own_options = {"radius": p["p_r"]}
        offsets = patches.ball(p["p_r"], p["p_r"], flat=False)
    if own == "geometric_expansion":
        own_options = {"offsets": tuple(offsets)}
    stride = [kwargs.pop(f"cd_{axis}", None) for axis in "hwd"]
    packing = kwargs.pop("packing_strategy", None) or "densest_packing"
    if None in stride:
        if packing not in packings[shape] and packing != "densest_packing":
            known = [*packings[shape], "densest_packing"]
            raise CatalogueError(f"{own}: unknown packing_strategy {packing!r}. {near_misses(packing, known)}")
        factors = packings[shape].get(packing, (0, 0, 0))
        stride = [max(1, int(f * size)) for f, size in zip(factors, unit, strict=True)]
    shape = (grid["h"], grid["w"], grid["d"])
    return kwargs | {"grid": shape, "channels": grid["universe_num"], "stride": tuple(stride)} | own_options


@dataclass(frozen=True)
class Migrated:
    """A function of this library under tinyBIG's calling conventions; what is not tinyBIG's is the record's own."""

    record: Any
    before: tuple[Map, ...] = ()
    after: tuple[Map, ...] = ()
    dims: Sequence[int] | None = None

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):
            raise AttributeError(attribute)
        return getattr(self.record, attribute)


class ExpansionLike(Migrated):
    """kappa: called with x."""

    @property
    def expansion(self) -> Expansion:
        made: Expansion = self.record.build() if isinstance(self.record, Bound) else self.record
        if not (self.before or self.after):
            return made
        before, after = Chain(self.before), Chain(self.after)
        return Expansion(made.name, lambda x: after(made(before(x))), made.dim, made.rule, made.domain, made.reach)

    def __call__(self, x: Tensor, device: Any = None) -> Tensor:
        return self.expansion(x)

    forward = __call__

    def calculate_D(self, m: int) -> int:
        return self.record.dim(m)


class ReconciliationLike(Migrated):
    """psi: called with w, n, D, or by keyword; `forward` in tinyBIG's order."""

    def __call__(
        self, w: Tensor | None = None, n: int = 0, D: int = 0, constants: Any = None, device: Any = None
    ) -> Tensor:
        w = torch.zeros(0, dtype=torch.get_default_dtype()) if w is None else w
        return self.record(w.reshape(-1) if w.ndim == 2 and w.shape[0] == 1 else w, n, D, constants)

    def forward(self, n: int, D: int, w: Tensor | None = None, device: Any = None, constants: Any = None) -> Tensor:
        return self(w, n, D, constants)

    def calculate_l(self, n: int, D: int) -> int:
        return self.record.length(n, D)


class RemainderLike(Migrated):
    """pi: called with x, n and, where it has them, w and b; b may be given to any."""

    def __call__(
        self, x: Tensor, n: int | None = None, w: Tensor | None = None, b: Tensor | None = None, m: int | None = None,
        device: Any = None,
    ) -> Tensor:  # fmt: skip
        n = n if n is not None else w.shape[0] if w is not None and w.ndim == 2 else x.shape[-1]
        w = w if w is None or tuple(w.shape) == (n, x.shape[-1]) else w.reshape(-1)
        return self.record(x, n, w, None if b is None else b.reshape(-1))

    def forward(
        self, x: Tensor, w: Tensor | None = None, b: Tensor | None = None, m: int | None = None, n: int | None = None,
        device: Any = None,
    ) -> Tensor:  # fmt: skip
        return self(x, n, w, b)

    def calculate_l(self, n: int, D: int) -> int:
        return self.record.length(D, n)


class FusionLike(Migrated):
    """A fusion: called with a list of tensors, and w (l,) or (1, l)."""

    def __call__(
        self, xs: Sequence[Tensor] = (), w: Tensor | None = None, x: Sequence[Tensor] = (), device: Any = None,
        constants: Any = None,
    ) -> Tensor:  # fmt: skip
        xs = [Chain(self.before)(part) for part in (xs or x)]
        needs = self.record.length([part.shape[-1] for part in xs])
        w = w.reshape(-1) if w is not None and needs else None
        return Chain(self.after)(self.record(xs, w, constants=constants))

    def forward(self, x: Sequence[Tensor], w: Tensor | None = None, device: Any = None) -> Tensor:
        return self(x, w)

    def calculate_n(self, dims: Sequence[int] | None = None) -> int:
        return self.record.width(self._dims(dims))

    def calculate_l(self, dims: Sequence[int] | None = None) -> int:
        return self.record.length(self._dims(dims))

    def _dims(self, dims: Sequence[int] | None) -> Sequence[int]:
        dims = dims if dims is not None else self.dims
        if dims is None:
            raise CatalogueError("calculate_l: dims is None; expected the widths of the inputs. Pass dims=[...].")
        return dims


_conventions: dict[str, type[Migrated]] = {
    "expansions": ExpansionLike, "reconciliations": ReconciliationLike, "remainders": RemainderLike,
    "fusions": FusionLike,
}  # fmt: skip
