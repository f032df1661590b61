"""Gradients that a function defines itself: Functions, hooks, checkpoints, gradients inside. Right, or refused by name.

Derivatives are compared with torch.autograd at the same function, twice;
learners with the inner problem done by hand, token by token, by plain autograd.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import dualform as df
from dualform import testing as laws
from dualform.calculus import check, jacobian, trace
from dualform.graphs import custom, kept
from dualform.graphs.custom import Listener
from dualform.learning import derive, program
from dualform.learning.sites import DerivationError
from dualform.shapes import TraceError

D = torch.float64
M = torch.randn(3, 3, dtype=D, generator=torch.Generator().manual_seed(0))
X = torch.tensor([-1.0, 0.5, 2.0], dtype=D)


class Legacy(Function):
    """forward(ctx, ...): the tutorial's relu, which writes into a clone of the gradient where a mask says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        g = g.clone()
        g[x < 0] = 0
        return 2 * g


class Modern(Function):
    """setup_context, and a gradient that reads the result as it was given out."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.tanh()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x, y = ctx.saved_tensors
        return g * (1 - y * y) * x.cos()


class Round(Function):
    """Straight through."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return (w * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Reverse(Function):
    """A number among the arguments; the result is a view of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return -ctx.scale * g, None


class Several(Function):
    """Several inputs and results, some without gradient; attributes, needs_input_grad, gradients that are None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, k: int) -> tuple[Tensor, ...]:
        a, b, above = x * y, (x + y).exp(), x > y
        c = a.round()
        ctx.mark_non_differentiable(above, c)
        ctx.save_for_backward(x, y, b)
        ctx.above, ctx.k = above, k
        ctx.set_materialize_grads(False)
        return a, b, above, c

    @staticmethod
    def backward(ctx: Any, ga: Tensor, gb: Tensor, _above: Any, _c: Any) -> tuple[Tensor | None, ...]:
        x, y, b = ctx.saved_tensors
        gx, gy = torch.zeros_like(x), torch.zeros_like(y)
        if ga is not None:
            gx, gy = gx + ga * y * ctx.k, gy + ga * x
        if gb is not None:
            gx, gy = gx + gb * b * ctx.above, gy + gb * b
        need = ctx.needs_input_grad
        return gx if need[0] else None, gy if need[1] else None, None


class Copied(Function):
    """A gradient of more axes than its input is summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor) -> Tensor:
        return x * b

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        return g, 2 * g


class Nested(Function):
    """Functions inside forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return Round.apply(x).sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * Modern.apply(x).cos()


class Deep(Nested):
    """A Function of the gradient: its value is one thing, its derivative another."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return Reverse.apply(g, 2.0) * Modern.apply(x).cos()


class Inside(Function):
    """A backward that differentiates something else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x @ M).tanh()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (found,) = torch.autograd.grad((leaf @ M).sin(), leaf, g, create_graph=True)
        return found


class Forward(Function):
    """A jvp of its own, which reverse mode does not read."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x.sin()

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return t

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0].cos()


def several(x: Tensor) -> Tensor:
    a, b, above, c = Several.apply(x, x.cos(), 3)
    return a * b * above + c * x


def hooked(x: Tensor) -> Tensor:
    h = x.sin()
    if h.requires_grad:
        h.register_hook(lambda g: 2 * g * h)
    return h * x


def hooked_late(x: Tensor) -> Tensor:
    """Two hooks, in their order, on what was used before; the op that made it reads its own result in its gradient."""
    h = (x @ M).tanh()
    y = h.square()
    if h.requires_grad:
        h.register_hook(lambda g: g * h)
        h.register_hook(lambda g: g + 0 * h if g is None else (g @ M) * h)
    return (y + h).sin()


def hooked_view(x: Tensor) -> Tensor:
    h = x * 2
    part = h[1:]
    part.register_hook(lambda g: 3 * g)
    return part.square() * h[0]


def observed(x: Tensor) -> Tensor:
    h = x.exp()
    h.register_hook(lambda g: None)
    return h


def data(x: Tensor) -> Tensor:
    h = x * 3
    h.data.clamp_(-1, 1)
    return h * h * x.data


def written_without_gradient(x: Tensor) -> Tensor:
    h = x * 3
    with torch.no_grad():
        h.clamp_(-1, 1)
        h[0] += 2
    return h * h


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        s = x.sum()
    return x * s.clone()


def switched(x: Tensor) -> Tensor:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    s = x.sin()
    torch.set_grad_enabled(before)
    return s * x


def energy(x: Tensor) -> Tensor:
    h = x * 2
    g, more = torch.autograd.grad((h @ M).tanh().square().sum(), [h, x], create_graph=True)
    return x - g * more


def energy_apart(x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_(True)
    (g,) = torch.autograd.grad((leaf @ M).tanh().square().sum(), leaf, create_graph=True)
    return x.sin() - g * x


def energy_constant(x: Tensor) -> Tensor:
    h = x * 2
    (g,) = torch.autograd.grad((h @ M).tanh().square().sum(), h)
    return x - g * h


def energy_written(x: Tensor) -> Tensor:
    h = x.sin()
    copy = h * 1
    copy[0] = h[1] * x.detach().sum()
    a, b = torch.autograd.grad([(copy * h).sum(), (h * copy * x)], [h, x], [None, h], create_graph=True)
    return a * b


def kept_apart(x: Tensor) -> Tensor:
    def loss(y: Tensor) -> Tensor:
        with torch.no_grad():
            s = y.sum()
        return (y.sin() * s * y * y.detach()).sum()

    return torch.func.grad(loss)(x) * x


def rows(x: Tensor) -> Tensor:
    return torch.stack([x, x * 2])


EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "legacy": lambda x: Legacy.apply(x) * x,
    "modern": lambda x: Modern.apply(x) * x,
    "rounding": lambda x: 3 * Round.apply(x @ M),
    "reversal": lambda x: Reverse.apply(x, 0.5) * x,
    "several": several,
    "copied": lambda x: Copied.apply(rows(x), x),
    "nested": lambda x: Nested.apply(x) * x,
    "a gradient in a backward": lambda x: Inside.apply(x),
    "a jvp beside": lambda x: Forward.apply(x),
    "kept constants": lambda x: Copied.apply(x, M[0]),
    "hook": hooked,
    "hooks of what was used": hooked_late,
    "hook of a view": hooked_view,
    "hook that looks": observed,
    "checkpoint": lambda x: checkpoint(lambda h: Modern.apply(h @ M), x, use_reentrant=False),
    "data": data,
    "written without gradient": written_without_gradient,
    "inference mode": inference,
    "switched off": switched,
    "retain_grad": lambda x: (h := x.sin()).retain_grad() or h * h,
    "energy": energy,
    "energy of a leaf": energy_apart,
    "energy without its graph": energy_constant,
    "energy after writing": energy_written,
    "functional.vjp": lambda x: torch.autograd.functional.vjp(lambda y: (y @ M).tanh(), x, x, create_graph=True)[1],
    "func.grad": kept_apart,
    "func.vjp": lambda x: torch.func.vjp(lambda y: (y @ M).exp() * y.detach(), x)[1](x)[0],
    "func.jvp": lambda x: torch.func.jvp(lambda y: (y @ M).sigmoid() * y, (x,), (x * x,))[1],
    "func.jacrev": lambda x: torch.func.jacrev(lambda y: (y @ M).exp() * y)(x),
    "func.hessian": lambda x: torch.func.hessian(lambda y: (y @ M).tanh().square().sum())(x),
    "vmap": lambda x: torch.vmap(lambda y: y * y.sum())(rows(x)),
    "vmap of grad": lambda x: torch.vmap(torch.func.grad(lambda y: (y @ M).tanh().square().sum()))(rows(x)),
    "a Function under vmap": lambda x: torch.vmap(lambda y: Modern.apply(y) * y)(rows(x)),
    "a Function under grad": lambda x: torch.func.grad(lambda y: (Modern.apply(y) * y).sum())(x),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own, at the first jvp of a process
@pytest.mark.parametrize("name", EXACT)
def test_first_and_second_derivatives_are_autograds(name: str) -> None:
    f = EXACT[name]
    J = df.jacobian(f, X)
    weights = torch.linspace(-1, 2, math.prod(J.out_shape), dtype=D)

    def scalar(x: Tensor) -> Tensor:
        return f(x).flatten() @ weights

    expected: Any = torch.autograd.functional.jacobian(f, X)
    torch.testing.assert_close(J.dense(), expected, rtol=1e-12, atol=1e-12)
    v, g = torch.ones_like(X), weights.reshape(J.out_shape)
    torch.testing.assert_close(J.vjp(g), torch.autograd.functional.vjp(f, X, g)[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(J.jvp(v), expected @ v, rtol=1e-12, atol=1e-12)
    twice: Any = torch.autograd.functional.hessian(scalar, X)
    torch.testing.assert_close(df.hessian(scalar, X).dense(), twice, rtol=1e-11, atol=1e-11)
    for _ in range(2):  # interpreted, and from the second use on as a program
        torch.testing.assert_close(
            df.jacobian(f, X + 1).dense(), torch.autograd.functional.jacobian(f, X + 1), rtol=1e-12, atol=1e-12
        )  # type: ignore[arg-type]


def test_structure_is_kept_and_the_account_holds() -> None:
    assert df.jacobian(lambda x: 3 * Round.apply(x), X).structure == "J[i,j] = 3 δ(i,j)"
    assert df.jacobian(lambda x: Legacy.apply(x), X).nbytes == X.numel()  # truth values
    told = df.explain(lambda x: Legacy.apply(x) @ M, X)
    assert max(error for _, error in told.checks) < 1e-12
    assert check(lambda g, x: 2 * g * (x >= 0), lambda x: Legacy.apply(x), X).ok
    assert not check(lambda g, x: g * (x >= 0), lambda x: Legacy.apply(x), X).ok


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own, at the first jvp of a process
@pytest.mark.parametrize("name", ["func.jacrev", "func.jvp", "vmap", "vmap of grad"])
def test_transforms_inside_are_ops_while_torch_exports(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True)  # torch's tracer then keeps transforms as nodes
    gm = trace(EXACT[name], X)
    assert all(isinstance(n.target, torch._ops.OpOverload) for n in gm.graph.nodes if n.op == "call_function")
    torch.testing.assert_close(gm(X), EXACT[name](X), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_reentrant_checkpoints_and_compiled_parts_are_what_they_are_made_of() -> None:
    def inner(x: Tensor) -> Tensor:
        return Modern.apply(x @ M)

    expected: Any = torch.autograd.functional.jacobian(inner, X)
    compiled = torch.compile(inner)
    for f in (partial(checkpoint, inner, use_reentrant=True), compiled, lambda x: compiled(x)):
        torch.testing.assert_close(df.jacobian(lambda x, f=f: f(x), X).dense(), expected, rtol=1e-12, atol=1e-12)


class Clipped(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-0.4, 0.4)


class Offset(Clipped):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g + 1


class Branch(Clipped):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g if g.norm() > 1 else 2 * g


class Few(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return x * y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Narrow(Clipped):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g[:2]


class OnlyForward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return t


class Dirty(Clipped):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)


class Foreign(Clipped):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)


class Once(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * 3 * x * x


def module_with(name: str) -> nn.Module:
    module = nn.Linear(3, 3, dtype=D)
    getattr(module, name)(lambda m, gi, go: None)
    return module


FULL, OLD = module_with("register_full_backward_hook"), module_with("register_backward_hook")


def removes(x: Tensor) -> Tensor:
    h = x.sin()
    h.register_hook(lambda g: 2 * g).remove()
    return h


def hooks_constant(x: Tensor) -> Tensor:
    h = x.detach() * 2
    h.register_hook(lambda g: g)
    return h * x


def hooks_late(x: Tensor) -> Tensor:
    h = x * 2
    y = h.sin()
    h.register_hook(lambda g: g * y)
    return y


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    SCRIPTED = torch.jit.trace(nn.Linear(3, 3, dtype=D), torch.ones(3, dtype=D))
REFUSED: list[tuple[Callable[[Tensor], Tensor], str]] = [
    (lambda x: Clipped.apply(x), r"Clipped.apply is no linear function.*return g.clamp\(-0.4, 0.4\)"),
    (lambda x: Offset.apply(x), r"Offset.apply is no linear function.*return g \+ 1"),
    (lambda x: Branch.apply(x), r"return g if g.norm\(\) > 1.*reads a tensor's values"),
    (
        lambda x: Few.apply(x, x),
        r"Few.apply\(x, x\).*returns 1 gradients; expected one for each argument of forward = 2",
    ),
    (lambda x: Narrow.apply(x), r"gives a gradient of shape \(2,\); expected its input's = \(3,\)"),
    (lambda x: OnlyForward.apply(x), r"OnlyForward.apply\(x\).*has no backward; expected one"),
    (lambda x: Dirty.apply(x * 1), r"x.mul_\(2\).*writes to an input"),
    (lambda x: Foreign.apply(x), r"x.detach\(\).numpy\(\).*leaves torch"),
    (lambda x: FULL(x), r"FULL\(x\).*calls a module with a backward hook"),
    (lambda x: OLD(x), r"OLD\(x\).*grad_fn"),
    (lambda x: SCRIPTED(x), r"SCRIPTED\(x\).*runs TorchScript"),
    (removes, r"register_hook\(lambda g: 2 \* g\).remove\(\).*removed again"),
    (hooks_constant, r"h.register_hook\(lambda g: g\).*requires no gradient"),
    (hooks_late, r"h.register_hook\(lambda g: g \* y\).*used before.*Move it up"),
    (lambda x: x.register_post_accumulate_grad_hook(lambda p: None) or x, r"writing of .grad.*Use h.register_hook"),
    (lambda x: torch.autograd.backward([x.sum()]) or x, r"torch.autograd.backward.*Use torch.autograd.grad"),
    (lambda x: torch.autograd.grad(x.detach().sum(), x)[0], r"autograd.grad.*is of tensors without gradient"),
    (lambda x: torch.autograd.grad((x * 2).sum(), x * 2)[0], r"autograd.grad.*the result does not depend on"),
    (lambda x: torch.func.grad(lambda y: Legacy.apply(y).sum())(x), r"Legacy.apply\(y\).*setup_context"),
]


@pytest.mark.parametrize(("f", "message"), REFUSED)
def test_what_cannot_be_right_is_refused_by_name_and_line(f: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        df.jacobian(f, X).dense()


def test_a_gradient_marked_once_has_no_second() -> None:
    J = df.jacobian(lambda x: Once.apply(x), X)
    torch.testing.assert_close(J.dense(), (3 * X * X).diag(), rtol=1e-14, atol=0)
    with pytest.raises(TraceError, match=r"Once.apply\(x\).*marked once_differentiable"):
        df.hessian(lambda x: Once.apply(x).sum(), X).dense()


def test_nothing_stays_patched_and_other_threads_are_not_heard() -> None:
    apply = custom._SingleLevelFunction.__dict__.get("apply")
    seen: list[Tensor] = []

    def elsewhere() -> None:
        leaf = X.clone().requires_grad_()
        seen.append(torch.autograd.grad(Round.apply(leaf).sum(), leaf)[0])

    def during(x: Tensor) -> Tensor:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return Round.apply(x)

    trace(during, X)
    with pytest.raises(TraceError):
        trace(lambda x: Branch.apply(x), X)
    assert custom._SingleLevelFunction.__dict__.get("apply") is apply is None
    assert custom._listening.to == [(None, None)]
    assert torch.equal(seen[0], torch.ones_like(X))


def test_a_changed_gradient_is_another_trace() -> None:
    def made(scale: float) -> Callable[[Tensor], Tensor]:
        class Scaled(Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x * 1

            @staticmethod
            def backward(ctx: Any, g: Tensor) -> Tensor:
                return scale * g

        return lambda x: Scaled.apply(x)

    for scale in (2.0, 3.0):
        for _ in range(3):
            assert torch.equal(df.jacobian(made(scale), X).dense(), scale * torch.eye(3, dtype=D))


def test_a_gradient_whose_value_and_derivative_differ_has_no_second() -> None:
    def f(x: Tensor) -> Tensor:
        return Deep.apply(x) * x

    torch.testing.assert_close(
        df.jacobian(f, X).dense(),
        torch.autograd.functional.jacobian(f, X),
        rtol=1e-12,
        atol=1e-12,  # type: ignore[arg-type]
    )
    with pytest.raises(TraceError, match=r"Deep.apply.*return Reverse.apply\(g, 2.0\)"):
        df.hessian(lambda x: f(x).sum(), X)


# -- learners


class Learner(nn.Module):
    """Two fast weights and a slow one."""

    slow = ("s",)

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.W = nn.Parameter(torch.randn(4, 4, dtype=D, generator=g) / 2)
        self.U = nn.Parameter(torch.randn(4, 4, dtype=D, generator=g) / 2)
        self.s = nn.Parameter(torch.randn(4, dtype=D, generator=g))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)  # type: ignore[attr-defined]

    def energy(self, h: Tensor) -> Tensor:
        return ((h @ self.W).tanh().square() * self.s).sum()


class Product(Function):
    """Tokens and weights: the gradient of a weight is a sum over tokens of the function's own making."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 2 * g @ w.t(), 3 * x.t() @ g


class Halves(Function):
    """Two results, a slow weight whose gradient is summed over tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.sin() * s, (x + s).floor()
        ctx.save_for_backward(x, s, b)
        return a, b

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        x, s, b = ctx.saved_tensors
        return g * s + h * x, (g * x).sum(0) + (h * s * b).sum(0)


def on_hidden(m: Any, x: Tensor) -> Tensor:
    h = x @ m.W
    if h.requires_grad:
        h.register_hook(lambda g: g * 0.5)
    return h.tanh() @ m.U * m.s


def on_used(m: Any, x: Tensor) -> Tensor:
    h = (x @ m.W).tanh()
    y = h.square()
    if h.requires_grad:
        h.register_hook(lambda g: g.clamp(-0.3, 0.3))
        h.register_hook(lambda g: g * m.s * h)
    return (y + h) @ m.U


def on_weight(m: Any, x: Tensor) -> Tensor:
    w = m.W * 1
    if w.requires_grad:
        w.register_hook(lambda g: g.sign())
    return (x @ w).tanh() @ m.U * m.s


def clamped(m: Any, x: Tensor) -> Tensor:
    h = (x @ m.W) * 1
    with torch.no_grad():
        h.clamp_(-0.5, 0.5)
    return (h * h) @ m.U * m.s


def descends(m: Any, x: Tensor) -> Tensor:
    h = x @ m.U
    (g,) = torch.autograd.grad(m.energy(h), h, create_graph=True)
    return h - 0.3 * g


def descends_apart(m: Any, x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(m.energy(leaf), leaf, create_graph=True)
    return x @ m.U - g


LEARNERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "weights": lambda m, x: torch.tanh(x @ Round.apply(m.W)) @ m.U * m.s,
    "tokens": lambda m, x: Modern.apply(x @ m.W) @ m.U * m.s,
    "legacy": lambda m, x: Legacy.apply(x @ m.W) @ m.U * m.s,
    "both": lambda m, x: Modern.apply(Product.apply(x, m.W)) * m.s + x @ m.U,
    "a slow weight, two results": lambda m, x: sum(Halves.apply(x @ m.W, m.s)) @ m.U,  # type: ignore[operator]
    "not linear": lambda m, x: Clipped.apply(x @ m.W).tanh() @ Clipped.apply(m.U) * m.s,
    "nested": lambda m, x: Deep.apply(Modern.apply(x @ m.W) + Round.apply(m.s)) @ m.U,
    "reversal": lambda m, x: Reverse.apply((x @ m.W).tanh(), 0.5) @ m.U * m.s,
    "hook": on_hidden,
    "hooks": on_used,
    "hook of a weight": on_weight,
    "data": lambda m, x: (h := x @ m.W) * h.data.sigmoid() @ m.U * m.s,
    "written without gradient": clamped,
    "energy": descends,
    "energy of a leaf": descends_apart,
    "vmap of grad": lambda m, x: x @ m.U - torch.vmap(torch.func.grad(m.energy))(x),
    "grad": lambda m, x: x @ m.U - torch.func.grad(m.energy)(x),
    "vmap": lambda m, x: torch.vmap(lambda y: (y @ m.W).tanh() * m.s)(x) @ m.U,
}


def learner(f: Callable[[Any, Tensor], Tensor]) -> Learner:
    return type("Drawn", (Learner,), {"f": f})()


Loss = Callable[[Tensor, Tensor], Tensor]


def squared(prediction: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (prediction - target).square().sum(-1)


def tokens() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    x, v = (torch.randn(2, 5, 2, 4, dtype=D, generator=g, requires_grad=True) for _ in range(2))
    return x, v


def gradients(o: Tensor, inputs: list[Tensor]) -> dict[str, Tensor]:
    """The output, and the gradients of a scalar of it."""
    weights = torch.linspace(-1, 1, o.numel(), dtype=D).reshape(o.shape)
    found = torch.autograd.grad((o * weights).sum(), inputs, allow_unused=True, materialize_grads=True)
    return {"o": o.detach()} | {f"d {k}": g for k, g in enumerate(found)}


def by_hand(m: Learner, loss: Loss, chunk: int, rate: float) -> dict[str, Tensor]:
    """Plain autograd, token by token: gradients at the mini-batch's anchor, each token's own weights."""
    x, v = tokens()
    named = dict(m.named_parameters())
    fast = [n for n in named if n not in m.slow]
    slow = {n: named[n] for n in m.slow}
    columns = []
    for b in range(x.shape[0]):
        for h in range(x.shape[2]):
            th, moved, outputs = {n: named[n] * 1 for n in fast}, dict.fromkeys(fast, torch.zeros((), dtype=D)), []
            for t in range(x.shape[1]):
                if t % chunk == 0:
                    th, moved = {n: th[n] - moved[n] for n in fast}, dict.fromkeys(fast, torch.zeros((), dtype=D))
                value = loss(functional_call(m, th | slow, (x[b, t, h][None],))[0], v[b, t, h])
                found = torch.autograd.grad(
                    value, list(th.values()), create_graph=True, materialize_grads=True, allow_unused=True
                )
                moved = {n: moved[n] + rate * g for n, g in zip(fast, found, strict=True)}
                now = {n: th[n] - moved[n] for n in fast}
                outputs.append(functional_call(m, now | slow, (x[b, t, h][None],))[0])
            columns.append(torch.stack(outputs))
    o = torch.stack(columns).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
    return gradients(o, [x, v, *m.parameters()])


def derived(m: Learner, loss: Loss, chunk: int, rate: float, **options: Any) -> dict[str, Tensor]:
    x, v = tokens()
    o, _ = df.derive(m, loss, df.rules.SGD(rate), chunk=chunk)(x, x, v, **options)
    return gradients(o, [x, v, *m.parameters()])


@pytest.mark.parametrize("name", LEARNERS)
def test_learners_learn_by_their_own_gradients(name: str) -> None:
    """Outputs and outer gradients, over rows, heads and mini-batches, a ragged last one too."""
    m = learner(LEARNERS[name])
    laws.same_outcome(derived(m, squared, 3, 0.05), by_hand(m, squared, 3, 0.05), name)


@pytest.mark.parametrize("name", ["weights", "both", "not linear", "hooks", "written without gradient", "energy"])
def test_the_generated_code_has_them_too(name: str) -> None:
    m = learner(LEARNERS[name])
    laws.same_outcome(derived(m, squared, 3, 0.05, backend="cpp"), derived(m, squared, 3, 0.05, backend="eager"), name)


def test_the_printed_program_runs() -> None:
    p = df.derive(learner(LEARNERS["tokens"]), squared, df.rules.SGD(0.05), chunk=3)
    assert "dualform.kept" not in p.code
    exec(p.code, scope := {})
    assert callable(scope["mini_batch"])


def test_against_primal_with_masks_and_a_carried_state() -> None:
    p = df.derive(learner(LEARNERS["tokens"]), df.objectives.Squared(), df.rules.SGD(0.05, momentum=0.5), chunk=3)
    laws.check_forms(p, time=7, ragged=True, carried=True, resets=True)


def weighted(prediction: Tensor, target: Tensor) -> Tensor:
    apart = Round.apply(prediction - target)
    return (apart * (prediction - target)).sum(-1) / (1 + target.detach().square().sum(-1))


def hook_in_loss(prediction: Tensor, target: Tensor) -> Tensor:
    apart = prediction - target
    if apart.requires_grad:
        apart.register_hook(lambda g: 0.5 * g)
    with torch.no_grad():
        weight = 1 / (1 + apart.abs().sum(-1))
    return weight * apart.square().sum(-1)


@pytest.mark.parametrize("loss", [weighted, hook_in_loss])
@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_objectives_keep_their_gradients(loss: Loss, backend: str) -> None:
    m = learner(LEARNERS["tokens"])
    laws.same_outcome(derived(m, loss, 3, 0.05, backend=backend), by_hand(m, loss, 3, 0.05))


def test_rules_keep_their_gradients() -> None:
    def step(i: Tensor, lr: Tensor) -> df.Step:
        return df.Step(A=((1.0,),), b=(Modern.apply(0.3 * lr),), u=(lr / lr.detach(),), a=1.0)

    p = df.derive(learner(LEARNERS["tokens"]), "squared", df.Rule(step=step), chunk=3)
    laws.check_forms(p, time=5)


class Mixes(Clipped):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g / (1 + g.square().sum())


class Centred(Clipped):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Both(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 1, x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> Tensor:
        return (g + h).clamp(-1, 1)


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda m, x: Mixes.apply(x @ m.W), r"mixes tokens at return g / \(1 \+ g.square\(\).sum\(\)\)"),
        (lambda m, x: Centred.apply(x @ m.W), r"mixes tokens at return x - x.mean\(0\)"),
        (lambda m, x: (x @ m.W) * Clipped.apply(m.s), r"Clipped.apply.*is shared by all tokens.*g.clamp\(-0.4, 0.4\)"),
        (lambda m, x: sum(Both.apply(x @ m.W)), r"Both.apply.*has several results.*not linear"),
    ],
)
def test_learners_whose_gradients_mix_tokens_are_refused(f: Callable[[Any, Tensor], Tensor], message: str) -> None:
    with pytest.raises(DerivationError, match=message):
        df.derive(learner(f), squared, df.rules.SGD(0.05), chunk=3)(*[tokens()[0]] * 3)


def test_a_learner_marked_once_learns_and_has_no_outer_gradient() -> None:
    m = learner(lambda m, x: Once.apply(x @ m.W) @ m.U)
    x, v = (t.detach() for t in tokens())
    o, state = df.derive(m, squared, df.rules.SGD(0.05), chunk=3)(
        x, x, v, params={n: p.detach() for n, p in m.named_parameters()}
    )
    plain = learner(lambda m, x: (x @ m.W) ** 3 @ m.U)
    expected, _ = df.derive(plain, squared, df.rules.SGD(0.05), chunk=3)(x, x, v)
    torch.testing.assert_close(o, expected.detach(), rtol=1e-12, atol=1e-12)
    assert state.position.tolist() == [2, 2]
    with pytest.raises(TraceError, match="marked once_differentiable"):
        derived(m, squared, 3, 0.05)


# -- ops of one's own


@torch.library.custom_op("tests::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    return x**3


@torch.library.custom_op("tests::grow", mutates_args=())
def grow(x: Tensor, by: Tensor) -> Tensor:
    return (x * by).exp()


@torch.library.custom_op("tests::bare", mutates_args=())
def bare(x: Tensor) -> Tensor:
    return x**3


for _op in (cube, bare):
    _op.register_fake(torch.empty_like)
grow.register_fake(lambda x, by: torch.empty_like(x))
cube.register_autograd(
    lambda ctx, g: 5 * g * ctx.saved_tensors[0] ** 2,  # not that of a cube
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
grow.register_autograd(
    lambda ctx, g: (2 * g * ctx.saved_tensors[0] * ctx.saved_tensors[1], None),  # reads what it gave out
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output, inputs[1]),
)
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "alone": cube, "in between": lambda x: cube(2 * x).sin() @ M, "twice": lambda x: cube(cube(x)) * x,
    "the result is read": lambda x: grow(x.tanh(), x[:1].detach()) * x, "a number": lambda x: cube(x.sum()),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:dualform. tests::")
@pytest.mark.parametrize("name", OPS)
def test_a_registered_gradient_is_the_gradient_in_every_question(name: str) -> None:
    f = OPS[name]
    want: Any = torch.autograd.functional.jacobian(f, X)
    flat = want.reshape(-1, 3)
    for _ in range(2):  # interpreted, and from then on as a program
        J = jacobian(f, X)
        g = torch.randn(J.out_shape, dtype=D)
        torch.testing.assert_close(J.dense(), want, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(J.vjp(g), g.reshape(-1) @ flat, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(J.jvp(X).reshape(-1), flat @ X, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(torch.from_numpy(J.to_scipy_sparse().toarray()), flat, rtol=1e-11, atol=1e-11)
        assert max(error for _, error in J.explain().checks) < 1e-12
        assert check(lambda g, x: g.reshape(-1) @ flat, f, X)
        loss = lambda x: f(x).square().sum()  # noqa: E731
        expected: Any = torch.autograd.functional.hessian(loss, X)
        torch.testing.assert_close(df.hessian(loss, X).dense(), expected, rtol=1e-10, atol=1e-10)


def test_an_op_without_a_registered_gradient_is_refused_by_name() -> None:
    with pytest.raises(TraceError, match=r"tests::bare by x0 has no row.*register a gradient"):
        jacobian(bare, X).dense()


def test_a_vjp_of_an_op_of_ones_own_forms_no_matrix() -> None:
    x = torch.randn(1 << 16, dtype=D)
    got = jacobian(lambda x: cube(x), x).vjp(torch.ones_like(x))
    torch.testing.assert_close(got, 5 * x**2, rtol=1e-12, atol=1e-12)


# -- the law bites


def test_the_law_sees_an_ignored_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a Function is what its forward computes, a hook is nothing."""
    monkeypatch.setattr(program, "_programs", program.Bounded(16))
    monkeypatch.setattr(program, "_structures", program.Bounded(16))
    monkeypatch.setattr(Listener, "function", lambda self, cls, args: custom.Called(cls, args, (), "").result())
    monkeypatch.setattr(Listener, "hook", lambda self, h, f: None)
    monkeypatch.setattr("dualform.learning.front_door.expect_as_on_tensors", lambda *_: None)  # which sees it, too
    for name in ("tokens", "weights", "hook"):
        m = learner(LEARNERS[name])
        with pytest.raises(laws.LawBroken):
            laws.same_outcome(derived(m, squared, 3, 0.05), by_hand(m, squared, 3, 0.05))


def test_the_law_sees_the_forwards_gradient_in_outer_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the function is written out before its vjp is taken; the inner gradients are right,
    the outer are not."""
    monkeypatch.setattr(program, "_programs", program.Bounded(16))
    monkeypatch.setattr(program, "_structures", program.Bounded(16))
    m = learner(LEARNERS["tokens"])
    right = by_hand(m, squared, 3, 0.05)
    whole = derive.TracedStep.differentiable.func
    wrong = property(lambda step: kept.written_out(whole(step)))
    monkeypatch.setattr(derive.TracedStep, "differentiable", wrong)
    got = derived(m, squared, 3, 0.05)
    torch.testing.assert_close(got["o"], right["o"], rtol=1e-12, atol=1e-12)
    with pytest.raises(laws.LawBroken):
        laws.same_outcome(got, right)


def test_the_law_sees_the_forwards_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the calculus differentiates what a Function computes."""
    monkeypatch.setattr(Listener, "function", lambda self, cls, args: custom.Called(cls, args, (), "").result())
    assert jacobian(lambda x: 5 * Round.apply(x), X).is_zero
