"""The definition: one token after another, with the user's own module and torch's own gradients. All else is tested
against this and shares no line with it.

Legend: B batch, T time, H heads; th anchor, R registers, i position in the mini-batch (from 1), g gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from itertools import product
from operator import add
from typing import Any

import torch
from torch import Tensor
from torch.func import grad
from torch.utils._pytree import tree_map

from dualform.graphs.twin import typed
from dualform.learning.call import Call
from dualform.learning.state import State
from dualform.ops.spelled import differentiable_twice


def gradient(loss: Callable[..., Tensor], th: dict[str, Tensor], *rest: Any) -> dict[str, Tensor]:
    """Differentiate a token's loss by the weights: as autograd does, so that hooks and custom Functions count;
    by torch.func
    inside its transforms, where autograd cannot be asked."""
    if torch._C._are_functorch_transforms_active():
        return grad(loss)(th, *rest)
    outer = torch.is_grad_enabled()
    with torch.enable_grad():
        own = {w: x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for w, x in th.items()}
        value = loss(own, *rest)
        if not value.requires_grad:
            return {w: torch.zeros_like(x) for w, x in th.items()}
        found = torch.autograd.grad(
            value, list(own.values()), create_graph=outer, allow_unused=True, materialize_grads=True
        )
    return dict(zip(own, found, strict=True))


def times(c: Any, x: Tensor) -> Tensor:
    return x if type(c) is float and c == 1.0 else c * x


def mixed(weights: Any, tensors: list[Tensor]) -> Any:
    """sum_k weights_k tensors_k"""
    return reduce(add, map(times, weights, tensors)) if tensors else 0.0


def primal(program: Any, learner: Callable[..., Tensor], call: Call) -> tuple[Tensor, State]:
    """Run the rule token by token: gradients at the mini-batch's anchor, outputs with each token's own weights."""
    rule, kinds = program.rule, list(zip(program.rule.start, program.rule.resets, strict=True))
    (B, T, H), rows, objective = call.q.shape[:3], [], typed(program.objective, call.v.dtype)

    def predict(theta: dict[str, Tensor], h: int, x: Tensor) -> Tensor:
        rest = {name: p[h] if name in program.parts.slow else p for name, p in call.slow.items()}
        with differentiable_twice():
            return learner(theta | rest, x[None])[0]

    def loss(theta: dict[str, Tensor], h: int, k: Tensor, v: Tensor) -> Tensor:
        return objective(predict(theta, h, k)[None], (v - k if program.target == "v-k" else v)[None])[0]  # of rows

    for row, h in product(range(B), range(H)):
        th = {w: x[row, h] for w, x in call.state.anchor.items()}
        R = {w: list(x[row, h]) for w, x in call.state.registers.items()}
        i, outputs = int(call.state.position[row]), []
        q, k, v = (x[row, :, h].unbind() for x in (call.q, call.k, call.v))
        given = {name: x[row, :, h].unbind() for name, x in call.gates.items()}
        for t in range(T):
            if call.reset is not None and call.reset[row, t]:
                th, i = {w: x[h] for w, x in call.init.items()}, 0
                R = {w: [s * x for s in rule.start] for w, x in th.items()}
            if call.mask is not None and not call.mask[row, t]:
                outputs.append(torch.zeros_like(v[t]))
                continue
            i += 1
            gates = {name: x[t] for name, x in given.items()}
            gates |= {} if call.offset is None else {"offset": call.offset[i - 1]}
            A, b, u, a = rule.step(call.q.new_tensor(float(i)), **gates)
            g = gradient(loss, th, h, k[t], v[t])
            R = {w: [mixed(A[m], R[w]) + -b[m] * g[w] for m in range(len(b))] for w in th}
            theta = {w: times(a, th[w]) + mixed(u, R[w]) for w in th}
            outputs.append(predict(theta, h, q[t]))
            if i == program.chunk:
                th, i = theta, 0
                R = {w: [s * th[w] if new else x for (s, new), x in zip(kinds, R[w], strict=True)] for w in th}
        rows.append((torch.stack(outputs), th, {w: torch.stack(x) for w, x in R.items()}, torch.tensor(i)))
    o, anchor, registers, i = tree_map(lambda *x: torch.stack(x).unflatten(0, (B, H)), *rows)
    return o.transpose(1, 2), State(anchor, registers, i[:, 0].to(o.device))
