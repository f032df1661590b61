"""The laws of sequence layers: forms, backends, splits, causality, padding, resets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dualform.learning.layer import LayerState, TestTimeTraining
from dualform.learning.program import ChunkProgram, derive
from dualform.learning.state import State
from dualform.testing.agreement import agree, edges_of


@dataclass(frozen=True)
class Problem:
    """A program with inputs drawn at random; every floating tensor requires a gradient."""

    program: ChunkProgram
    tensors: dict[str, Tensor]  # q, k, v, gate.*, param.*, anchor.*, register.*
    mask: Tensor | None
    reset: Tensor | None
    position: Tensor | None

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: x for name, x in self.tensors.items() if name.startswith(prefix)}

    def state(self) -> State | None:
        return None if self.position is None else State(self.part("anchor."), self.part("register."), self.position)

    def run(
        self, form: str, time: slice = slice(None), state: State | None = None, **options: Any
    ) -> tuple[Tensor, State]:
        """Call the program on part of the sequence."""
        gates = {name: x if name == "offset" else x[:, time] for name, x in self.part("gate.").items()}
        q, k, v = (self.tensors[name][:, time] for name in "qkv")
        mask = None if self.mask is None else self.mask[:, time]
        reset = None if self.reset is None else self.reset[:, time]
        start = self.state() if state is None else state
        return self.program(
            q, k, v, gates, state=start, mask=mask, reset=reset, params=self.part("param."), form=form, **options
        )


def draw(
    program: ChunkProgram, *, seed: int = 0, batch: int = 2, time: int = 11, heads: int = 2, carried: bool = False,
    ragged: bool = False, resets: bool = False, dtype: torch.dtype = torch.float64,
) -> Problem:  # fmt: skip
    """Draw a problem: sizes small enough for a loop over tokens, numbers large enough for every path to matter."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    K, V = program.derivation.K, program.derivation.V
    parts, rule = program.parts, program.rule
    x = {"q": normal(batch, time, heads, K), "k": normal(batch, time, heads, K), "v": normal(batch, time, heads, V)}
    for name in rule.gates:
        if name == "offset":
            x["gate.offset"] = 0.3 * normal(program.chunk)
        else:
            x[f"gate.{name}"] = 0.1 + 0.4 * torch.rand(batch, time, heads, generator=g, dtype=torch.float64).to(dtype)
    for name, p in {**parts.fast, **parts.slow}.items():
        x[f"param.{name}"] = p.detach().to(dtype).expand(heads, *p.shape) + 0.3 * normal(heads, *p.shape)
    position = None
    if carried:
        position = torch.randint(0, program.chunk, (batch,), generator=g)
        for name, p in parts.fast.items():
            own = x[f"param.{name}"].expand(batch, heads, *p.shape)
            x[f"anchor.{name}"] = own + 0.1 * normal(batch, heads, *p.shape)
            registers = 0.1 * normal(batch, heads, rule.num_registers, *p.shape)
            start = torch.stack([s * x[f"anchor.{name}"] for s in rule.start], 2)
            fresh = (position == 0)[:, None, None] & torch.tensor(rule.resets)
            x[f"register.{name}"] = torch.where(fresh.reshape(*fresh.shape, *[1] * p.ndim), start, start + registers)
    x = {name: t.clone().detach().requires_grad_() for name, t in x.items()}
    mask = torch.rand(batch, time, generator=g) > 0.3 if ragged else None
    reset = torch.rand(batch, time, generator=g) > 0.8 if resets else None
    return Problem(program, x, mask, reset, position)


def outcome(problem: Problem, run: Callable[[], tuple[Tensor, State]], seed: int = 1) -> dict[str, Tensor]:
    """Collect outputs, final state, and the gradients of a random scalar of both with respect to every input."""
    return _scalar_and_grads(*run(), problem.tensors, seed)


def _scalar_and_grads(o: Tensor, state: State | LayerState, inputs: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    results = {"o": o, **{f"state {name}": x for name, x in state.tensors().items()}}
    g = torch.Generator().manual_seed(seed)
    scalar = torch.zeros((), dtype=torch.float64)
    for x in results.values():
        if x.is_floating_point():
            scalar = scalar + (x.double() * torch.randn(x.shape, generator=g, dtype=torch.float64)).sum()
    grads = torch.autograd.grad(scalar, list(inputs.values()), allow_unused=True, materialize_grads=True)
    return {n: x.detach() for n, x in results.items()} | {f"d {n}": x for n, x in zip(inputs, grads, strict=True)}


def same_outcome(got: dict[str, Tensor], expected: dict[str, Tensor], where: str = "") -> None:
    """Demand that two outcomes agree in everything."""
    for name, x in expected.items():
        agree(f"{where} {name}".strip(), got[name], x)


def check_forms(program: ChunkProgram, forms: Sequence[str] = ("auto",), **drawn: Any) -> None:
    """Law: every form equals the primal form in outputs, final state and all outer gradients."""
    problem = draw(program, **drawn)
    expected = outcome(problem, lambda: problem.run("primal"))
    for form in forms:
        same_outcome(outcome(problem, lambda form=form: problem.run(form)), expected, form)


def check_backend(program: ChunkProgram, backend: str, **drawn: Any) -> None:
    """Law: a backend equals eager in outputs, final state and all outer gradients."""
    problem = draw(program, **drawn)
    expected = outcome(problem, lambda: problem.run("auto", backend="eager"))
    same_outcome(outcome(problem, lambda: problem.run("auto", backend=backend)), expected, backend)


def check_split(program: ChunkProgram, cuts: Sequence[int], forms: Sequence[str] = ("auto",), **drawn: Any) -> None:
    """Law: a sequence cut anywhere, the state carried, is the sequence in one call; forms may change between calls."""
    problem = draw(program, **drawn)
    T = problem.tensors["q"].shape[1]
    edges = edges_of(cuts, T)

    def pieces() -> tuple[Tensor, State]:
        outputs, state = [], problem.state()
        for n, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
            o, state = problem.run(forms[n % len(forms)], slice(start, stop), state)
            outputs.append(o)
        assert state is not None
        return torch.cat(outputs, 1), state

    same_outcome(outcome(problem, pieces), outcome(problem, lambda: problem.run(forms[0])), f"cut at {edges[1:-1]}")


def check_causal(program: ChunkProgram, at: int, form: str = "auto", **drawn: Any) -> None:
    """Law: output t ignores every token after t."""
    problem = draw(program, **drawn)
    o, _ = problem.run(form)
    g = torch.Generator().manual_seed(9)
    later = dict(problem.tensors)
    for name in ("q", "k", "v"):
        x = later[name].detach().clone()
        x[:, at:] = torch.randn(x[:, at:].shape, generator=g, dtype=x.dtype)
        later[name] = x
    changed, _ = replace(problem, tensors=later).run(form)
    agree(f"o before {at}", changed[:, :at], o[:, :at])


def check_padding(program: ChunkProgram, form: str = "auto", seed: int = 0, time: int = 9, **drawn: Any) -> None:
    """Law: padding anywhere in a row changes nothing for the tokens that are there."""
    problem = draw(program, seed=seed, time=time, **drawn)
    o, state = problem.run(form)
    g = torch.Generator().manual_seed(seed)
    B, longer = o.shape[0], time + 5
    places = torch.stack([torch.randperm(longer, generator=g)[:time].sort().values for _ in range(B)])
    mask = torch.zeros(B, longer, dtype=torch.bool).scatter(1, places, True)

    def spread(x: Tensor) -> Tensor:
        y = torch.randn(B, longer, *x.shape[2:], generator=g, dtype=x.dtype)
        y[torch.arange(B)[:, None], places] = x.detach()
        return y

    moved = {
        n: spread(x) if n in "qkv" or (n.startswith("gate.") and n != "gate.offset") else x
        for n, x in problem.tensors.items()
    }
    got, after = replace(problem, tensors=moved, mask=mask, reset=None).run(form)
    agree("o of valid tokens", got[torch.arange(B)[:, None], places], o)
    agree("o of padding", got[~mask], torch.zeros_like(got[~mask]))
    same_outcome(after.tensors(), state.tensors(), "state")


def check_reset(program: ChunkProgram, at: int, form: str = "auto", **drawn: Any) -> None:
    """Law: a document that starts inside a row is that document alone."""
    problem = draw(program, **drawn)
    reset = torch.zeros(problem.tensors["q"].shape[:2], dtype=torch.bool)
    reset[:, at] = True
    packed, after = replace(problem, reset=reset).run(form)
    alone, state = replace(problem, position=None, reset=None).run(form, slice(at, None))
    agree(f"o from {at}", packed[:, at:], alone)
    same_outcome(after.tensors(), state.tensors(), "state")


def check_static(program: ChunkProgram, learner: nn.Module, form: str = "auto", **drawn: Any) -> None:
    """Law: with a rate of zero (and no decay) the layer is the learner itself."""
    problem = draw(program, **drawn)
    tensors = {n: x for n, x in problem.tensors.items() if not n.startswith("param.")}
    tensors["gate.lr"] = torch.zeros_like(tensors["gate.lr"])
    o, _ = replace(problem, tensors=tensors, position=None).run(form)
    agree("o", o, learner(problem.tensors["q"]))


def check_layer(
    layer: TestTimeTraining, cuts: Sequence[int], *, seed: int = 0, batch: int = 2, time: int = 11,
    ragged: bool = False, resets: bool = False,
) -> None:  # fmt: skip
    """Law: a layer cut anywhere, its state carried, is one call, in y, state, gradients; y ignores the future."""
    g = torch.Generator().manual_seed(seed)
    dtype = layer.o_proj.weight.dtype
    x = torch.randn(batch, time, layer.dim, generator=g, dtype=dtype).requires_grad_()
    mask = torch.rand(batch, time, generator=g) > 0.3 if ragged else None
    reset = torch.rand(batch, time, generator=g) > 0.8 if resets else None
    tensors = {"x": x, **dict(layer.named_parameters())}
    edges = edges_of(cuts, time)

    def run(edges: Sequence[int]) -> tuple[Tensor, LayerState]:
        outputs: list[Tensor] = []
        state: LayerState | None = None
        for start, stop in zip(edges, edges[1:], strict=False):
            marks = [None if m is None else m[:, start:stop] for m in (mask, reset)]
            y, state = layer(x[:, start:stop], state, attention_mask=marks[0], reset=marks[1])
            outputs.append(y)
        assert state is not None
        return torch.cat(outputs, 1), state

    whole = run([0, time])
    found = [_scalar_and_grads(*out, tensors, seed) for out in (whole, run(edges))]
    same_outcome(found[1], found[0], f"cut at {edges[1:-1]}")
    later = x.detach().clone()
    later[:, time // 2 :] = torch.randn(later[:, time // 2 :].shape, generator=g, dtype=dtype)
    y, _ = layer(later, attention_mask=mask, reset=reset)
    agree(f"y before {time // 2}", y[:, : time // 2], whole[0][:, : time // 2])


def check_learner(
    learner: nn.Module, objective: Any = "squared", rule: Any = "sgd", *, chunk: int = 4,
    forms: Sequence[str] = ("auto",), seed: int = 0,
) -> None:  # fmt: skip
    """Every law of sequence layers for one learner: forms, splits, causality, padding, resets."""
    program = derive(learner, objective, rule, chunk=chunk)
    check_forms(program, forms, seed=seed, time=2 * chunk + 3)
    check_forms(program, forms, seed=seed + 1, time=2 * chunk + 3, carried=True, ragged=True, resets=True)
    check_split(program, [1, chunk, chunk + 2], ("auto", "primal"), seed=seed, time=2 * chunk + 3, carried=True)
    check_causal(program, chunk + 1, seed=seed)
    check_padding(program, seed=seed)
    check_reset(program, chunk // 2 + 1, seed=seed, time=2 * chunk + 3)
