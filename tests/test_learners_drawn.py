"""Learners that nobody wrote: hypothesis draws them, none may be refused, and the law of forms holds for each.

DUALFORM_EXAMPLES=300 draws more of them, at random. The end of a test session says how many there were and how many
were refused.
"""

import os
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import dualform as df
from dualform import testing as laws

DOUBLE = torch.float64
activations = {
    "tanh": torch.tanh, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid, "sin": torch.sin, "softplus": F.softplus, "elu": F.elu, "leaky": F.leaky_relu,
    "softmax": lambda x: x.softmax(-1), "log_softmax": lambda x: x.log_softmax(-1),
    "square": lambda x: 0.3 * x.square(),
    "in place": lambda x: x.clone().relu_(), "unit": lambda x: x / (0.1 + x.square().sum(-1, keepdim=True)).sqrt(),
    "centred": lambda x: x - x.mean(-1, keepdim=True), "clamp": lambda x: x.clamp(-1.5, 1.5),
    "flip": lambda x: x.flip(-1),
    "rms": lambda x: F.rms_norm(x, x.shape[-1:]), "neg": lambda x: -x,
    "where": lambda x: torch.where(x > 0.2, x, 0.5 * x),
}  # fmt: skip
weights = {
    "plain": lambda A, B: A, "product": lambda A, B: A @ B, "hadamard": lambda A, B: A * B, "sum": lambda A,
    B: A - 0.5 * B,
    "gram": lambda A, B: A @ A.T, "exp": lambda A, B: (A - 1).exp(), "softmax": lambda A, B: A.softmax(0),
    "tanh": lambda A, B: A.tanh(), "norm": lambda A, B: B[0] * A / A.square().sum(0).sqrt(), "transposed": lambda A,
    B: A.T,
    "triple": lambda A, B: A @ B @ A.T, "skew": lambda A, B: A - A.T, "triangle": lambda A, B: A.tril(),
    "eye": lambda A, B: torch.eye(A.shape[0], dtype=A.dtype) + 0.3 * A, "scaled": lambda A, B: A * B.mean(),
    "column": lambda A, B: A * B[:, :1],
}  # fmt: skip


@dataclass(frozen=True)
class Op:
    """One line of a drawn learner: what, with which detail, over which earlier value; `names` are its parameters."""

    kind: str
    detail: object = None
    other: int = 0
    names: tuple[str, ...] = ()


class Drawn(nn.Module):
    """Run a list of ops over the values so far; the last one is the prediction."""

    def __init__(self, dim, ops, shapes, buffers, slow):
        super().__init__()
        self.dim, self.ops, self.slow = dim, tuple(ops), tuple(slow)
        for n, (name, shape) in enumerate(shapes.items()):
            g = torch.Generator().manual_seed(n)
            self.register_parameter(name, nn.Parameter(0.6 * torch.randn(*shape, generator=g, dtype=DOUBLE)))
        for name, shape in buffers.items():
            self.register_buffer(name, torch.linspace(-1, 1, shape[0], dtype=DOUBLE))

    def extra_repr(self):
        return "\n".join(map(str, self.ops)) + f"\nslow={self.slow}"

    def forward(self, x):
        values = [x]
        for op in self.ops:
            values.append(self.apply_op(op, values[-1], values[op.other]))
        return values[-1]

    def apply_op(self, op, x, y):
        p = [getattr(self, name) for name in op.names]
        n = x.shape[-1]
        match op.kind:
            case "act":
                return activations[op.detail](x)
            case "linear":
                return F.linear(x, *p)
            case "weight":
                return x @ weights[op.detail](*p)
            case "einsum":
                return torch.einsum("...i,ij,jk->...k", x, *p)
            case "bilinear":
                return 0.3 * torch.einsum("...i,ij,...j->...i", x, p[0], y)
            case "kronecker":
                a = p[0].shape[0]
                return torch.einsum("...ab,ac,bd->...cd", x.unflatten(-1, (a, n // a)), *p).flatten(-2)
            case "groups":
                return (x.reshape(*x.shape[:-1], n // op.detail, op.detail) @ p[0]).flatten(-2)
            case "transpose":
                return x.unflatten(-1, (op.detail, n // op.detail)).transpose(-1, -2).flatten(-2)
            case "attend":  # the groups of a row attend to each other
                h = x.unflatten(-1, (op.detail, n // op.detail))
                return ((h @ p[0]) @ h.transpose(-1, -2)).softmax(-1).matmul(h).flatten(-2)
            case "gain":
                return (
                    x
                    * {"plain": p[0], "one": 1 + p[0], "exp": (0.5 * p[0]).exp(), "sigmoid": p[0].sigmoid()}[op.detail]
                )
            case "bias":
                return x + p[0]
            case "scalar":
                return p[0] * x + (1 - p[0]) * y
            case "buffer":
                return x * p[0]
            case "norm":
                return F.layer_norm(x, (n,), *p) if op.detail == "layer" else F.rms_norm(x, (n,), *p[:1])
            case "residual":
                return {
                    "add": x + y,
                    "sub": y - x,
                    "mul": x * y.tanh(),
                    "max": torch.maximum(x, y),
                    "gate": x * F.silu(y),
                }[op.detail]
            case "cat":
                return torch.cat([x, y], -1)
            case "slice":
                return x[..., op.detail :]
            case "chunk":
                a, b = x.chunk(2, -1)
                return a * b.sigmoid()
            case "outer":
                return 0.3 * (x[..., :, None] * y[..., None, :]).flatten(-2)
        raise AssertionError(op)


@st.composite
def learners(draw):
    """Draw a learner of up to 8 ops, widths at most 9, parameters tied where shapes allow."""
    K = draw(st.sampled_from([2, 3, 4, 6]))
    widths, ops, shapes, buffers = [K], [], {}, {}

    def new(*shape):
        tied = [name for name, s in shapes.items() if s == shape]
        if tied and draw(st.integers(0, 3)) == 0:
            return draw(st.sampled_from(tied))
        name = f"p{len(shapes)}"
        shapes[name] = shape
        return name

    def add(op, width):
        ops.append(op)
        widths.append(width)

    def one():
        n, j = widths[-1], draw(st.integers(0, len(widths) - 1))
        same = [k for k, w in enumerate(widths[:-1]) if w == n]
        halves = [a for a in (2, 3) if n % a == 0 and n > a]
        able = ["act", "act", "linear", "weight", "weight", "einsum", "gain", "bias", "buffer", "norm"]
        able += ["residual", "residual", "scalar", "bilinear"] if same else []
        able += ["cat"] if n + widths[j] <= 9 else []
        able += ["outer"] if n * widths[j] <= 9 else []
        able += ["slice"] if n > 2 else []
        able += ["chunk"] if n % 2 == 0 and n > 2 else []
        able += ["kronecker", "groups", "transpose", "attend"] if halves else []
        kind, m = draw(st.sampled_from(able)), draw(st.integers(2, 5))
        match kind:
            case "act":
                add(Op(kind, draw(st.sampled_from(list(activations)))), n)
            case "linear":
                add(Op(kind, None, 0, (new(m, n), new(m)) if draw(st.booleans()) else (new(m, n),)), m)
            case "weight":
                add(Op(kind, draw(st.sampled_from(list(weights))), 0, (new(n, n), new(n, n))), n)
            case "einsum":
                add(Op(kind, None, 0, (new(n, 2), new(2, m))), m)
            case "bilinear":
                add(Op(kind, None, draw(st.sampled_from(same)), (new(n, n),)), n)
            case "kronecker":
                a = draw(st.sampled_from(halves))
                add(Op(kind, None, 0, (new(a, 2), new(n // a, 2))), 4)
            case "groups":
                a = draw(st.sampled_from(halves))
                add(Op(kind, a, 0, (new(a, 2),)), n // a * 2)
            case "transpose":
                add(Op(kind, draw(st.sampled_from(halves))), n)
            case "attend":
                a = draw(st.sampled_from(halves))
                add(Op(kind, a, 0, (new(n // a, n // a),)), n)
            case "gain":
                add(Op(kind, draw(st.sampled_from(["plain", "one", "exp", "sigmoid"])), 0, (new(n),)), n)
            case "bias":
                add(Op(kind, None, 0, (new(n),)), n)
            case "scalar":
                add(Op(kind, None, draw(st.sampled_from(same)), (new(1),)), n)
            case "buffer":
                buffers[f"table{n}"] = (n,)
                add(Op(kind, None, 0, (f"table{n}",)), n)
            case "norm":
                add(Op(kind, draw(st.sampled_from(["layer", "rms"])), 0, (new(n), new(n))), n)
            case "residual":
                add(
                    Op(kind, draw(st.sampled_from(["add", "sub", "mul", "max", "gate"])), draw(st.sampled_from(same))),
                    n,
                )
            case "cat":
                add(Op(kind, None, j), n + widths[j])
            case "slice":
                start = draw(st.integers(1, n - 2))
                add(Op(kind, start), n - start)
            case "chunk":
                add(Op(kind), n // 2)
            case "outer":
                add(Op(kind, None, j), n * widths[j])

    for _ in range(draw(st.integers(2, 8))):
        one()
    used = {name for op in ops for name in op.names if name in shapes}
    if len(ops) == 0 or not used:
        n, m = widths[-1], draw(st.integers(2, 5))
        add(Op("linear", None, 0, (new(m, n), new(m))), m)
    slow = draw(st.sampled_from([(), (), (sorted(shapes)[0],)])) if len(shapes) > 1 else ()
    return Drawn(K, ops, shapes, buffers, slow)


rules = {
    "sgd": df.rules.SGD(lr=0.1), "averaged": df.rules.SGD(lr=0.1, averaged=True),
    "momentum": df.rules.SGD(lr=0.05, momentum=0.7),
    "decay": df.rules.SGD(lr=0.1, decay=0.2), "titans": df.rules.SGD(lr=0.05, momentum=0.6, decay=0.1),
}  # fmt: skip


def is_tame(problem):
    """Does the definition itself neither diverge nor amplify rounding beyond any tolerance?"""
    found = laws.outcome(problem, lambda: problem.run("primal"))
    return all(x.isfinite().all() and x.abs().max() < 1e4 for x in found.values() if x.is_floating_point())


def test_learners_drawn(record_property):
    many = int(os.environ.get("DUALFORM_EXAMPLES", "12"))
    seen = {"examples": 0, "refused": 0, "diverged": 0, "dual": 0}

    @settings(
        max_examples=many,
        deadline=None,
        derandomize="DUALFORM_EXAMPLES" not in os.environ,
        database=None,
        phases=[Phase.generate, Phase.shrink] if "DUALFORM_EXAMPLES" in os.environ else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        learner=learners(),
        objective=st.sampled_from([df.objectives.Squared(), df.objectives.DotProduct()]),
        rule=st.sampled_from(list(rules)),
        chunk=st.sampled_from([3, 2, 4, 1]),
        seed=st.integers(0, 9),
    )
    def forms_agree(learner, objective, rule, chunk, seed):
        seen["examples"] += 1
        try:
            program = df.derive(learner, objective, rules[rule], chunk=chunk)
        except df.DerivationError:
            seen["refused"] += 1
            raise
        drawn = {"time": 2 * chunk + 2, "carried": True, "ragged": True, "resets": True, "seed": seed}
        tame = is_tame(laws.draw(program, **drawn))
        seen["diverged"] += not tame
        assume(tame)
        laws.check_forms(program, **drawn)
        if seen["examples"] % 3 == 0 and all(site.why == "" for site in program.sites):
            seen["dual"] += 1
            laws.check_forms(program, ["dual"], time=2 * chunk, seed=seed)

    try:
        forms_agree()
    finally:
        for name, count in seen.items():
            record_property(f"learners drawn: {name}", count)
    assert seen["refused"] == 0
