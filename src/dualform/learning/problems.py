"""What a proof compares: drawn problems, how a program and its definition answer them, and how far these are apart."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dualform.learning.state import State

WHOLE = 32  # mini-batches up to which the definition runs over whole ones; longer ones are proved in blocks of so many


@dataclass(frozen=True)
class Drawn:
    """Drawn inputs of a program; every floating tensor in `leaves` has a gradient."""

    leaves: dict[str, Tensor]  # q, k, v, gate.*, param.*, anchor.*, register.*
    reach: dict[tuple[int, int], int]  # how many tokens the definition follows, by row and head
    position: Tensor | None = None
    mask: Tensor | None = None
    reset: Tensor | None = None
    cut: int | None = None

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: x for name, x in self.leaves.items() if name.startswith(prefix)}

    def run(self, program: Any, form: str, *, whole: bool = False, **options: Any) -> tuple[Tensor, State]:
        """Run the program, in two calls where there is a cut; whole: in one."""
        state = None if self.position is None else State(self.part("anchor."), self.part("register."), self.position)
        T = self.tokens
        cut = T if self.cut is None or whole else self.cut
        outputs = []
        for time_ in (slice(0, cut), slice(cut, T)) if cut < T else (slice(0, T),):
            q, k, v = (self.leaves[n][:, time_] for n in "qkv")
            gates = {n: x if n == "offset" else x[:, time_] for n, x in self.part("gate.").items()}
            marks = {n: None if x is None else x[:, time_] for n, x in (("mask", self.mask), ("reset", self.reset))}
            o, state = program(q, k, v, gates, state=state, params=self.part("param."), form=form, **marks, **options)
            outputs.append(o)
        assert state is not None
        return torch.cat(outputs, 1), state

    @property
    def tokens(self) -> int:
        return self.leaves["q"].shape[1]

    def followed(self, run: tuple[Tensor, State]) -> dict[str, Tensor]:
        """Name the outputs and the state of a run, where the definition follows them."""
        return _named([_piece(run, *at, n, n == self.tokens) for at, n in self.reach.items()])

    def defined(self, program: Any) -> dict[str, Tensor]:
        """Name the same as the definition gives it."""
        runs = {at: self.alone(*at, n).run(program, "primal", whole=True) for at, n in self.reach.items()}
        return _named([_piece(runs[at], 0, 0, n, n == self.tokens) for at, n in self.reach.items()])

    def alone(self, row: int, head: int, n: int) -> Drawn:
        """Take the first tokens of one row and head."""
        rows, heads = slice(row, row + 1), slice(head, head + 1)
        places = {"param": (heads,), "anchor": (rows, heads), "register": (rows, heads)}

        def cut(name: str, x: Tensor) -> Tensor:
            place = places.get(name.partition(".")[0], (rows, slice(n), heads))
            return x if name == "gate.offset" else x[place]

        mask, reset = (None if x is None else x[rows, :n] for x in (self.mask, self.reset))
        position = None if self.position is None else self.position[rows]
        return Drawn({name: cut(name, x) for name, x in self.leaves.items()}, {(0, 0): n}, position, mask, reset)


def _piece(run: tuple[Tensor, State], row: int, head: int, n: int, ends: bool) -> tuple[Tensor, dict[str, Tensor]]:
    o, state = run
    held = {f"the state's {name}": x[row, head] for name, x in state.tensors().items() if x.is_floating_point()}
    return o[row, :n, head], held if ends else {}


def _named(pieces: list[tuple[Tensor, dict[str, Tensor]]]) -> dict[str, Tensor]:
    outputs, states = torch.cat([o for o, _ in pieces]), [held for _, held in pieces if held]
    return {"the outputs": outputs} | {n: torch.stack([x[n] for x in states]) for n in states[0]}


def outcome(results: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add to outputs and state the gradients of a random scalar of both by every input."""
    g = torch.Generator().manual_seed(1)
    terms = [(x * torch.randn(x.shape, generator=g).to(x)).sum() for x in results.values()]
    grads = torch.autograd.grad(
        sum(terms[1:], terms[0]), list(inputs.values()), allow_unused=True, materialize_grads=True
    )
    found = {f"the gradient of {_called(n)}": x for n, x in zip(inputs, grads, strict=True)}
    return {n: x.detach() for n, x in results.items()} | found


def _called(name: str) -> str:
    part, _, rest = name.partition(".")
    words = {"gate": "the gate ", "param": "", "anchor": "the incoming ", "register": "the register of "}
    return words[part] + rest if part in words else name


def differences(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Measure every tensor's largest error, relative to its largest entry (and to a small share of all gradients')."""
    largest = max((largest_entry(x) for n, x in expected.items() if n.startswith("the gradient")), default=0.0)
    found = {}
    for name, x in expected.items():
        scale = max(largest_entry(x), 1e-3 * largest if name.startswith("the gradient") else 0.0) or 1.0
        error = largest_entry(got[name] - x) / scale
        found[name] = math.inf if math.isnan(error) else error
    return found


def largest_entry(x: Tensor) -> float:
    """Return the largest magnitude; 0 of nothing."""
    return float(x.abs().max()) if x.numel() else 0.0


class Draw:
    """Draws the problems of a program at a width, in a dtype, deterministically."""

    def __init__(self, program: Any, K: int, V: int, dtype: torch.dtype, noise: float) -> None:
        self.program, self.K, self.V, self.dtype, self.noise = program, K, V, dtype, noise
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def weights(self) -> dict[str, Tensor]:
        """The learner's own in the first head; in the second own times exp(noise), and a little where they are zero."""
        found = {}
        for name, p in {**self.program.parts.fast, **self.program.parts.slow}.items():
            own = self.normal(*p.shape) * 0.3 if p.is_meta else p.detach().to("cpu", self.dtype)
            typical = float(own.abs().mean()) or 0.1
            drawn = own * torch.exp(self.noise * self.normal(*p.shape))
            drawn = drawn + (own == 0) * self.noise * typical * self.normal(*p.shape)
            found[f"param.{name}"] = torch.stack([own, drawn])
        return found

    def gates(self, T: int, rate: float) -> dict[str, Tensor]:
        rule, found = self.program.rule, {}
        for name in rule.gates:
            if name == "offset":
                found["gate.offset"] = 0.1 * self.normal(self.program.chunk)
                continue
            middle = rate if name == "lr" else rule.default(name) or 0.2
            found[f"gate.{name}"] = middle * (0.7 + 0.3 * self.uniform(2, T, 2))
        return found

    def problem(self, T: int, rate: float, ragged: bool) -> Drawn:
        x = {"q": self.normal(2, T, 2, self.K), "k": self.normal(2, T, 2, self.K), "v": self.normal(2, T, 2, self.V)}
        x |= self.gates(T, rate) | self.weights()
        device, along = self.program.door.device, (T, 4, 4, T) if ragged else (2, T, T, 2)
        reach = {at: min(n, T) for at, n in zip(itertools.product(range(2), range(2)), along, strict=True)}
        if not ragged and self.program.chunk <= WHOLE:
            return Drawn(_leaves(x, device), reach)
        program, b = self.program, self.program.chunk
        position = torch.tensor([0, b // 2]) if b <= WHOLE else torch.tensor([b - T // 2, b // 2])
        fresh = (position == 0)[:, None] & torch.tensor(program.rule.resets)
        for name, p in program.parts.fast.items():
            anchor = x[f"param.{name}"].expand(2, 2, *p.shape) * (1 + 0.5 * self.noise * self.normal(2, 2, *p.shape))
            start = torch.stack([s * anchor for s in program.rule.start], 2)
            drawn = start + self.noise * float(anchor.abs().mean()) * self.normal(*start.shape)
            at_start = fresh[:, None].reshape(2, 1, -1, *[1] * p.ndim)
            x |= {f"anchor.{name}": anchor, f"register.{name}": torch.where(at_start, start, drawn)}
        if not ragged:
            return Drawn(_leaves(x, device), reach, position[:1].expand(2).clone().to(device))
        if "gate.lr" in x:
            x["gate.lr"][1, T // 2 :] = 0.0
        mask, reset, cut = torch.ones(2, T, dtype=torch.bool), torch.zeros(2, T, dtype=torch.bool), (T + 1) // 2
        mask[:, 1] = False
        reset[1, min(3, cut - 1)] = reset[0, (cut + T) // 2] = True  # in each part, which then has blocks of one kind
        return Drawn(_leaves(x, device), reach, position.to(device), mask.to(device), reset.to(device), cut)


def _leaves(x: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: t.detach().clone().to(device).requires_grad_() for name, t in x.items()}
