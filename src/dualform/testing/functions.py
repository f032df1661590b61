"""The laws of functions: derivatives, expansions, reconciliations, remainders, fusions, heads."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualform.calculus.jacobian import jacobian
from dualform.catalogue import Bound
from dualform.functions.basis import expansions, vocabulary
from dualform.functions.head import Head, span_of
from dualform.functions.multilinear import Outer
from dualform.testing.agreement import LawBroken, agree


def check_derivative(f: Callable[..., Tensor], *args: Tensor, wrt: int = 0) -> None:
    """Law: the structured derivative, materialised, is torch.func.jacrev's; its vjp and jvp are autograd's."""
    J = jacobian(f, *args, wrt=wrt)
    expected = torch.func.jacrev(f, argnums=wrt)(*args)
    agree("dense", J.dense(), expected)
    g = torch.Generator().manual_seed(0)
    u = torch.randn(J.out_shape, generator=g, dtype=expected.dtype)
    w = torch.randn(J.in_shape, generator=g, dtype=expected.dtype)
    n = u.ndim
    agree("vjp", J.vjp(u), torch.tensordot(u, expected, n))
    agree("jvp", J.jvp(w), torch.tensordot(expected, w, w.ndim))


def _rows(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def _refused(what: str, call: Callable[[], Any], *values: object) -> None:
    """Demand an error that names the values."""
    try:
        call()
    except ValueError as error:
        if missing := [v for v in values if str(v) not in str(error)]:
            raise LawBroken(f"{what}: the error does not name {missing}: {error}") from None
    else:
        raise LawBroken(f"{what}: accepted; expected an error.")


def _each_matters(y: Tensor, w: Tensor, seed: int) -> None:
    """Demand that y has a gradient by every entry of w."""
    (grad,) = torch.autograd.grad((y * _rows(*y.shape, seed=seed)).sum(), w, retain_graph=True)
    if not bool((grad != 0).all()):
        raise LawBroken(f"gradient: {int((grad == 0).sum())} of {w.numel()} entries of w have none; expected 0.")


def check_expansion(e: Any, m: int = 4, seed: int = 0) -> None:
    """Law: kappa has D = rule(m) features of x's dtype, mixes no rows, draws nothing, is what its record says.

    That is: differentiable on its domain, finite there and to the ends of its reach in float32, the same after
    serialisation, equal to its functions phi, to its features as text, and to what it is contracted into.
    e: a bound record of `expansions`, or an Expansion. m: a number of attributes that it takes.
    """
    D = e.dim(m)
    g = torch.Generator().manual_seed(seed)
    low, high = e.domain
    if not -1e9 < low < high < 1e9:
        raise LawBroken(f"domain: {e.domain}; expected a finite interval.")

    def inside(*shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=g, dtype=torch.float64)

    x = inside(5, m)
    before = x.clone()
    y = e(x)
    agree("x after the call", x, before)
    agree("kappa again", e(x), y)
    agree("shape", torch.zeros_like(y), x.new_zeros(5, D))
    if e.batchwise:
        for lead in ((), (3,), (2, 3), (0,), (2, 0)):
            agree(f"shape {lead}", torch.zeros_like(e(inside(*lead, m))), x.new_zeros(*lead, D))
        agree("rows alone", torch.stack([e(row) for row in x]), y)
        agree("vmap", torch.vmap(e)(x), y)
    agree("batches alone", e(torch.stack([x, 2 * x]))[0], y)
    for dtype in (torch.float32, torch.bfloat16):
        if e(x.to(dtype)).dtype != dtype:
            raise LawBroken(f"dtype: {e(x.to(dtype)).dtype}; expected x's {dtype}.")
    _check_values(e, m, inside)
    _check_text(e, x, y)
    if e.power > 1:
        weight = _rows(2, D, seed=seed)
        agree("contract", e.contract(x, weight), y @ weight.mT)
    if isinstance(e, Bound):
        read = expansions.build(json.loads(json.dumps(e.to_json())))
        if len({e, read, copy.deepcopy(e), pickle.loads(pickle.dumps(e))}) != 1:
            raise LawBroken(f"serialisation: {read}; expected {e}.")
        agree("kappa of what was read", read(x), y)


def _check_values(e: Any, m: int, inside: Callable[..., Tensor]) -> None:
    """Differentiable on the domain, finite there in float32, and finite to the ends of the reach."""
    try:
        torch.autograd.gradcheck(e, (inside(5, m).requires_grad_(),), fast_mode=e.dim(m) > 50)
    except Exception as error:  # gradcheck has no error of its own; whatever fails, the law does not hold
        raise LawBroken(f"gradient on {e.domain}: {error}") from None
    ends = {"domain": e.domain, "reach": (max(e.reach[0], -1e30), min(e.reach[1], 1e30))}
    for name, (low, high) in ends.items():
        for x in (torch.full((5, m), low), torch.full((5, m), high), low + (high - low) * inside(5, m).sigmoid()):
            if not bool(e(x.float()).isfinite().all()):
                raise LawBroken(f"float32 on the {name} {(low, high)}: not finite; expected finite numbers.")


def _check_text(e: Any, x: Tensor, y: Tensor) -> None:
    """The features as text evaluate to the features, and the functions of one attribute lie where the layout says."""
    if e.batchwise:
        names = [f"x{i}" for i in range(x.shape[-1])]
        features = e.features(names)
        if len(features) != y.shape[-1]:
            raise LawBroken(f"features: {len(features)} names; expected D = {y.shape[-1]}.")
        row = vocabulary | dict(zip(names, x[0].tolist(), strict=True))
        values = [float(eval(f, {"__builtins__": {}}, row)) for f in features]
        agree("features as text", torch.tensor(values, dtype=torch.float64), y[0])
    if e.width is not None and e.power == 1:
        phi = e.phi(x)
        agree("phi", (phi if e.layout == "attribute" else phi.mT).flatten(-2), y)


def check_reconciliation(r: Any, n: int, D: int, seed: int = 0) -> None:
    """Law: psi eats exactly l(n, D) numbers, each of which matters; apply is the matrix; what is frozen stays.

    r: a bound record of `reconciliations`, or anything with length, constants, apply and a call.
    """
    l = r.length(n, D)
    w = _rows(l, seed=seed).requires_grad_()
    W = r(w, n, D)
    agree("shape", W.new_zeros(W.shape), w.new_zeros(n, D))
    for wrong in (l + 1, max(0, l - 1)):
        if wrong != l:
            _refused("w of a wrong length", lambda wrong=wrong: r(w.new_zeros(wrong), n, D), wrong, l)
            _refused("apply", lambda wrong=wrong: r.apply(w.new_zeros(2, D), w.new_zeros(wrong), n), wrong, l)
    if l:
        _each_matters(W, w, seed + 1)
    agree("dense again", r(w, n, D, r.constants(n, D)), W)
    for lead in ((), (3,), (2, 3), (0,)):
        kappa = _rows(*lead, D, seed=seed + 2)
        agree(f"apply {lead}", r.apply(kappa, w, n), kappa @ W.mT)
    for width in (d for d in range(2, D) if D % d == 0):
        outer = Outer(_rows(2, D // width, seed=seed + 3), _rows(2, width, seed=seed + 4))
        agree(f"apply to an outer product of {D // width} and {width}", r.apply(outer, w, n), outer.dense() @ W.mT)
    kappa = _rows(4, D, seed=seed + 5)
    agree("vmap", torch.vmap(lambda row: r.apply(row, w, n))(kappa), kappa @ W.mT)
    single = r.apply(kappa.float(), w.detach().float(), n)
    agree("float32", single, (kappa @ W.mT).detach().float())


def check_remainder(p: Any, m: int, n: int, seed: int = 0) -> None:
    """Law: pi keeps leading axes and dtype, mixes no rows, eats exactly l(m, n) numbers, each of which matters."""
    l = p.length(m, n)
    w = _rows(l, seed=seed).requires_grad_() if l else None
    for lead in ((), (3,), (2, 3), (0,)):
        x = _rows(*lead, m, seed=seed + 1)
        y = p(x, n, w)
        agree(f"shape {lead}", y.new_zeros(y.shape), x.new_zeros(*lead, n))
    x = _rows(4, m, seed=seed + 2)
    y = p(x, n, w)
    agree("rows alone", torch.stack([p(row, n, w) for row in x]), y)
    if w is not None:
        agree("as a matrix", p(x, n, w.reshape(n, m)), y)
        _refused("w of a wrong length", lambda: p(x, n, x.new_zeros(l + 1)), l + 1, n, m)
        _refused("no w", lambda: p(x, n), n, m)
        _each_matters(y, w, seed + 3)
    agree("float32", p(x.float(), n, None if w is None else w.detach().float()), y.detach().float())


def check_fusion(u: Any, dims: Sequence[int], n: int | None = None, seed: int = 0) -> None:
    """Law: a fusion keeps leading axes and dtype, its rows do not mix, and it eats exactly l(dims, n) numbers."""
    l, width = u.length(dims, n), u.width(dims, n)
    w = _rows(l, seed=seed).requires_grad_() if l else None
    for lead in ((), (3,), (2, 3), (0,)):
        y = u([_rows(*lead, d, seed=seed + k) for k, d in enumerate(dims)], w, n)
        agree(f"shape {lead}", y.new_zeros(y.shape), torch.zeros(*lead, width, dtype=torch.float64))
    xs = [_rows(4, d, seed=seed + k) for k, d in enumerate(dims)]
    y = u(xs, w, n)
    agree("rows alone", torch.stack([u([x[k] for x in xs], w, n) for k in range(4)]), y)
    if w is not None:
        _refused("w of a wrong length", lambda: u(xs, w.new_zeros(l + 1), n), l + 1, l)
        _refused("no w", lambda: u(xs, None, n), l)
        _each_matters(y, w, seed + 3)
    agree("float32", u([x.float() for x in xs], None if w is None else w.detach().float(), n), y.detach().float())


def check_head(head: Head, seed: int = 0) -> None:
    """Law: a head is its formula on the full features and matrices; it survives saving, copies, vmap; w matters.

    The weights are compared at random values, constants included; rows are drawn within the expansion's domain.
    """
    head = copy.deepcopy(head).double()
    low, high = head.expansion.domain
    g = torch.Generator().manual_seed(seed)
    x = low + (high - low) * torch.rand(6, head.m, generator=g, dtype=torch.float64)
    y = head(x)
    kappa = head.expansion(x)
    frozen = {name.removeprefix("frozen_fusion_"): b for name, b in head.named_buffers() if "frozen_fusion_" in name}
    ys = [kappa @ W.mT for W in head.matrix()]
    expected = head.fusion(ys, head.fusion_weight, head.n, frozen)
    expected = expected if head.bias is None else expected + head.bias
    expected = expected + head.remainder(x, head.n, head.remainder_weight, head.remainder_bias)
    agree("formula", y, expected)
    agree("leading axes", head(x.reshape(2, 3, head.m)), y.reshape(2, 3, head.n))
    agree("empty", head(x[:0]), y[:0])
    agree("vmap", torch.vmap(head)(x), y)
    if head.w.numel():
        (grad,) = torch.autograd.grad((y * _rows(6, head.n, seed=seed)).sum(), head.w)
        if not grad.isfinite().all() or not bool((grad != 0).any()):
            raise LawBroken("gradient: w has none, or one that is not finite.")
    for spelling in ("dict", "json", "toml"):
        config = type(head.config)
        again = getattr(config, f"from_{spelling}")(getattr(head.config, f"to_{spelling}")())
        if again != head.config:
            raise LawBroken(f"{spelling}: {again}; expected {head.config}.")
    fresh = again.build().double()
    fresh.load_state_dict(head.state_dict())
    for name, other in (("reloaded", fresh), ("pickled", pickle.loads(pickle.dumps(head)))):
        if not torch.equal(other(x), y):
            raise LawBroken(f"{name}: another output; expected the same bits.")
    _refused("another width", lambda: head(x[:, :0]), head.m)


def check_unit_scale(head: Head, tolerance: float = 0.15, rows: int = 8192, seed: int = 0) -> None:
    """Law: a new head's output has mean square 1 on standard normal rows (within the domain, if it has poles).

    Not asked of heads that have nothing to scale: no w, or an output that w does not reach.
    """
    span = span_of(head.expansion)
    x = _rows(rows, head.m, seed=seed)
    while not bool(((x >= span[0]) & (x <= span[1])).all()):
        x = torch.where((x >= span[0]) & (x <= span[1]), x, _rows(rows, head.m, seed=(seed := seed + 1)))
    found = float(copy.deepcopy(head).double()(x).detach().square().mean())
    if head.w.numel() and not abs(found - 1) <= tolerance:
        raise LawBroken(f"mean square: {found:.3f}; expected 1 within {tolerance}.")
