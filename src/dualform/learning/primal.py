"""The definition: one token after another, with the user's own module and torch.func.grad. Everything else is tested
against this and shares no line with it.

Legend: B batch, T time, H heads; th anchor, R registers, i position in the mini-batch (from 1), g gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call, grad

from dualform.learning.state import State


def primal(call) -> tuple[Tensor, State]:  # type: ignore[no-untyped-def]  # `call` is program.Inputs, checked and cast
    """Run the rule token by token: gradients at the mini-batch's anchor, outputs with each token's own weights."""
    rule, chunk, leaves = call.rule, call.chunk, list(call.state.anchor)
    (B, T, H), rows = call.q.shape[:3], []

    def predict(theta: dict[str, Tensor], h: int, x: Tensor) -> Tensor:
        rest = {name: p[h] for name, p in call.slow.items()} | call.buffers
        return functional_call(call.learner, theta | rest, (x[None],))[0]

    def loss(theta: dict[str, Tensor], h: int, k: Tensor, v: Tensor) -> Tensor:
        return call.objective(predict(theta, h, k), v - k if call.target == "v-k" else v)

    for n in range(B * H):
        row, h = divmod(n, H)
        th = {leaf: call.state.anchor[leaf][row, h] for leaf in leaves}
        R = {leaf: list(call.state.registers[leaf][row, h]) for leaf in leaves}
        i, outputs = int(call.state.position[row]), []
        for t in range(T):
            if call.reset is not None and call.reset[row, t]:
                th, i = {leaf: call.init[leaf][h] for leaf in leaves}, 0
                R = {leaf: [s * th[leaf] for s in rule.start] for leaf in leaves}
            if call.mask is not None and not call.mask[row, t]:
                outputs.append(torch.zeros_like(call.v[row, t, h]))
                continue
            i += 1
            gates = {name: x[i - 1] if name == "offset" else x[row, t, h] for name, x in call.gates.items()}
            A, b, u, a = rule.step(call.q.new_tensor(float(i)), **gates)
            g = grad(loss)(th, h, call.k[row, t, h], call.v[row, t, h])
            R = {
                w: [sum(A[m][l] * R[w][l] for l in range(len(b))) - b[m] * g[w] for m in range(len(b))] for w in leaves
            }
            theta = {w: a * th[w] + sum(u[m] * R[w][m] for m in range(len(b))) for w in leaves}
            outputs.append(predict(theta, h, call.q[row, t, h]))
            if i == chunk:
                th, i = theta, 0
                R = {
                    w: [s * th[w] if new else x for s, new, x in zip(rule.start, rule.resets, R[w], strict=True)]
                    for w in leaves
                }
        rows.append((torch.stack(outputs), th, {w: torch.stack(R[w]) for w in leaves}, i))

    def gather(values: list[Tensor]) -> Tensor:
        return torch.stack(values).unflatten(0, (B, H))

    o = gather([x[0] for x in rows]).transpose(1, 2)
    anchor = {w: gather([x[1][w] for x in rows]) for w in leaves}
    registers = {w: gather([x[2][w] for x in rows]) for w in leaves}
    return o, State(anchor, registers, torch.tensor([x[3] for x in rows[::H]], device=o.device))
