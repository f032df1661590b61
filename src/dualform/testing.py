"""The laws, public: what must hold of every learner, objective, rule, form and function, and of yours.

Each law takes the thing it judges, compares it with an independent definition, and raises `LawBroken` with the name of the
quantity and the error. Tolerances are one table by dtype; nothing loosens it.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dualform.calculus.jacobian import jacobian
from dualform.catalogue import Bound
from dualform.functions.basis import expansions, vocabulary
from dualform.functions.head import Head, span_of
from dualform.functions.multilinear import Outer
from dualform.learning.layer import LayerState, TestTimeTraining
from dualform.learning.program import ChunkProgram, derive
from dualform.learning.state import State

tolerances = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 3e-2}


class LawBroken(AssertionError):
    """A law does not hold; the message says where and by how much."""


def agree(name: str, got: Tensor, expected: Tensor) -> None:
    """Demand that two tensors are equal to the tolerance of their dtype, relative to the larger of 1 and their scale."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise LawBroken(f"{name}: {tuple(got.shape)} {got.dtype}; expected {tuple(expected.shape)} {expected.dtype}.")
    if not got.dtype.is_floating_point:
        if not torch.equal(got, expected):
            raise LawBroken(f"{name}: {got.tolist()}; expected {expected.tolist()}.")
        return
    got, expected = got.detach(), expected.detach()
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    error = float((got - expected).abs().max()) / scale if got.numel() else 0.0
    if not error <= tolerances[got.dtype]:
        raise LawBroken(f"{name}: error {error:.3g} of scale {scale:.3g}; expected <= {tolerances[got.dtype]:.3g}.")


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
    program: ChunkProgram,
    *,
    seed: int = 0,
    batch: int = 2,
    time: int = 11,
    heads: int = 2,
    carried: bool = False,
    ragged: bool = False,
    resets: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Problem:
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
            x[f"anchor.{name}"] = x[f"param.{name}"].expand(batch, heads, *p.shape) + 0.1 * normal(
                batch, heads, *p.shape
            )
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
    edges = sorted({0, T, *(c for c in cuts if 0 < c < T)})

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
    for name, x in state.tensors().items():
        agree(f"state {name}", after.tensors()[name], x)


def check_reset(program: ChunkProgram, at: int, form: str = "auto", **drawn: Any) -> None:
    """Law: a document that starts inside a row is that document alone."""
    problem = draw(program, **drawn)
    reset = torch.zeros(problem.tensors["q"].shape[:2], dtype=torch.bool)
    reset[:, at] = True
    packed, after = replace(problem, reset=reset).run(form)
    alone, state = replace(problem, position=None, reset=None).run(form, slice(at, None))
    agree(f"o from {at}", packed[:, at:], alone)
    for name, x in state.tensors().items():
        agree(f"state {name}", after.tensors()[name], x)


def check_static(program: ChunkProgram, learner: nn.Module, form: str = "auto", **drawn: Any) -> None:
    """Law: with a rate of zero (and no decay) the layer is the learner itself."""
    problem = draw(program, **drawn)
    tensors = {
        n: torch.zeros_like(x) if n == "gate.lr" else x
        for n, x in problem.tensors.items()
        if not n.startswith("param.")
    }
    o, _ = replace(problem, tensors=tensors, position=None).run(form)
    agree("o", o, learner(problem.tensors["q"]))


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


def check_layer(
    layer: TestTimeTraining,
    cuts: Sequence[int],
    *,
    seed: int = 0,
    batch: int = 2,
    time: int = 11,
    ragged: bool = False,
    resets: bool = False,
) -> None:
    """Law: a layer cut anywhere, its state carried, is the layer in one call, in y, state and gradients; y ignores the future."""
    g = torch.Generator().manual_seed(seed)
    dtype = layer.o_proj.weight.dtype
    x = torch.randn(batch, time, layer.dim, generator=g, dtype=dtype).requires_grad_()
    mask = torch.rand(batch, time, generator=g) > 0.3 if ragged else None
    reset = torch.rand(batch, time, generator=g) > 0.8 if resets else None
    tensors = {"x": x, **dict(layer.named_parameters())}
    edges = sorted({0, time, *(c for c in cuts if 0 < c < time)})

    def run(edges: Sequence[int]) -> tuple[Tensor, LayerState]:
        outputs: list[Tensor] = []
        state: LayerState | None = None
        for start, stop in zip(edges, edges[1:], strict=False):
            marks = {
                name: None if m is None else m[:, start:stop]
                for name, m in (("attention_mask", mask), ("reset", reset))
            }
            y, state = layer(x[:, start:stop], state, **marks)
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


def _text(model: Any, seed: int, batch: int, time: int, ragged: bool, resets: bool) -> dict[str, Tensor]:
    """Draw a batch of texts; every row has a token."""
    g = torch.Generator().manual_seed(seed)
    text = {"input_ids": torch.randint(0, model.config.vocab_size, (batch, time), generator=g)}
    if ragged:
        text["attention_mask"] = (torch.rand(batch, time, generator=g) > 0.3).long()
        text["attention_mask"][:, time // 2] = 1
    if resets:
        text["reset"] = torch.rand(batch, time, generator=g) > 0.8
    return text


@torch.no_grad()
def _logits(model: Any, text: dict[str, Tensor], cuts: Iterable[int] = ()) -> Tensor:
    """Read a text in parts, the cache carried."""
    T = text["input_ids"].shape[1]
    edges = sorted({0, T, *(c for c in cuts if 0 < c < T)})
    cache, found = None, []
    for start, stop in zip(edges, edges[1:], strict=False):
        part = {name: x[:, start:stop] for name, x in text.items()}
        out = model(**part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, 1)


def _tokens(text: dict[str, Tensor], x: Tensor) -> Tensor:
    """Keep what stands at tokens, (N, ...); what a model says at padding is not defined."""
    mask = text.get("attention_mask")
    return x.flatten(0, 1) if mask is None else x[mask.bool()]


def check_model_split(
    model: Any,
    cuts: Iterable[int],
    *,
    seed: int = 0,
    batch: int = 2,
    time: int = 13,
    ragged: bool = False,
    resets: bool = False,
) -> None:
    """Law: a text cut anywhere, the cache carried, is the text in one call. Cut everywhere: decoding is forward.

    model: a causal language model in eval mode, called as transformers' are, with `reset` (B, T) where documents start.
    """
    text, cuts = _text(model, seed, batch, time, ragged, resets), list(cuts)
    agree(f"logits cut at {cuts}", _tokens(text, _logits(model, text, cuts)), _tokens(text, _logits(model, text)))


def check_model_padding(
    model: Any, cuts: Iterable[int] = (), *, seed: int = 0, batch: int = 2, time: int = 13, resets: bool = False
) -> None:
    """Law: padding anywhere in a row, and cutting at it, changes nothing for the tokens that are there."""
    text = _text(model, seed, batch, time, False, resets)
    g = torch.Generator().manual_seed(seed)
    longer = time + 5
    places = torch.stack([torch.randperm(longer, generator=g)[:time].sort().values for _ in range(batch)])
    padded = _text(model, seed + 1, batch, longer, False, False)
    padded["input_ids"] = padded["input_ids"].scatter(1, places, text["input_ids"])
    padded["attention_mask"] = torch.zeros(batch, longer, dtype=torch.long).scatter(1, places, 1)
    if resets:
        padded["reset"] = torch.zeros(batch, longer, dtype=torch.bool).scatter(1, places, text["reset"])
    got = _logits(model, padded, cuts)[torch.arange(batch)[:, None], places]
    agree("logits among padding", got, _logits(model, text))


def check_model_batch(
    model: Any, *, seed: int = 0, batch: int = 3, time: int = 13, ragged: bool = False, resets: bool = False
) -> None:
    """Law: a row of a batch is that row alone."""
    text = _text(model, seed, batch, time, ragged, resets)
    together = _logits(model, text)
    for row in range(batch):
        alone = {name: x[row : row + 1] for name, x in text.items()}
        agree(f"logits of row {row}", _tokens(alone, together[row : row + 1]), _tokens(alone, _logits(model, alone)))


def check_model_reset(
    model: Any, at: int, *, seed: int = 0, batch: int = 2, time: int = 13, ragged: bool = False
) -> None:
    """Law: a document that starts inside a row is that document alone."""
    text = _text(model, seed, batch, time, ragged, False)
    reset = torch.zeros(batch, time, dtype=torch.bool)
    reset[:, at] = True
    alone = {name: x[:, at:] for name, x in text.items()}
    packed = _logits(model, text | {"reset": reset})[:, at:]
    agree(f"logits of the document from {at}", _tokens(alone, packed), _tokens(alone, _logits(model, alone)))


def check_model_causal(
    model: Any, at: int, *, seed: int = 0, batch: int = 2, time: int = 13, ragged: bool = False
) -> None:
    """Law: what a model says before a token ignores it."""
    text = _text(model, seed, batch, time, ragged, False)
    other = text["input_ids"].clone()
    other[:, at:] = (other[:, at:] + 1) % model.config.vocab_size
    before = {name: x[:, :at] for name, x in text.items()}
    got, expected = (_logits(model, text | {"input_ids": ids})[:, :at] for ids in (other, text["input_ids"]))
    agree(f"logits before {at}", _tokens(before, got), _tokens(before, expected))


def check_model_generation(model: Any, lengths: Sequence[int], *, seed: int = 0, num_tokens: int = 6) -> None:
    """Law: greedy generation, prompts of these lengths in one batch, is forward on each text again and again."""
    text = _text(model, seed, len(lengths), max(lengths), False, False)
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    found = model.generate(
        text["input_ids"],
        attention_mask=mask.long(),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    for row, n in enumerate(lengths):
        ids = text["input_ids"][row : row + 1, max(lengths) - n :]
        for _ in range(num_tokens):
            ids = torch.cat([ids, _logits(model, {"input_ids": ids})[:, -1:].argmax(-1)], 1)
        agree(f"generate, row {row}", found[row, max(lengths) - n :], ids[0])


@torch.no_grad()
def check_model_rollback(
    model: Any,
    cuts: Iterable[int],
    taken: Sequence[int],
    *,
    seed: int = 0,
    batch: int = 2,
    time: int = 13,
    ragged: bool = False,
    resets: bool = False,
) -> None:
    """Law: columns that are read and taken back (`cache.crop`) were never read. taken: how many after each part of the text."""
    text, cuts = _text(model, seed, batch, time, ragged, resets), list(cuts)
    edges = sorted({0, time, *(c for c in cuts if 0 < c < time)})
    cache, found = None, []
    for n, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
        back = min(taken[n % len(taken)], time - stop) if cache is not None else 0
        part = {name: x[:, start : stop + back] for name, x in text.items()}
        out = model(**part, past_key_values=cache, use_cache=True)
        if cache is None:
            cache = out.past_key_values
            cache.activate_past_recording()
        else:
            cache.crop(-back)
        found.append(out.logits[:, : stop - start])
    agree(
        f"logits with {list(taken)} taken back", _tokens(text, torch.cat(found, 1)), _tokens(text, _logits(model, text))
    )


def check_learner(
    learner: nn.Module,
    objective: Any = "squared",
    rule: Any = "sgd",
    *,
    chunk: int = 4,
    forms: Sequence[str] = ("auto",),
    seed: int = 0,
) -> None:
    """Every law of sequence layers for one learner: forms, splits, causality, padding, resets."""
    program = derive(learner, objective, rule, chunk=chunk)
    check_forms(program, forms, seed=seed, time=2 * chunk + 3)
    check_forms(program, forms, seed=seed + 1, time=2 * chunk + 3, carried=True, ragged=True, resets=True)
    check_split(program, [1, chunk, chunk + 2], ("auto", "primal"), seed=seed, time=2 * chunk + 3, carried=True)
    check_causal(program, chunk + 1, seed=seed)
    check_padding(program, seed=seed)
    check_reset(program, chunk // 2 + 1, seed=seed, time=2 * chunk + 3)


# -- functions ---------------------------------------------------------------------------------------------------------


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


def check_expansion(e: Any, m: int = 4, seed: int = 0) -> None:
    """Law: kappa has D = rule(m) features of x's dtype, rows do not mix, it draws nothing, and it is what its record says.

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
    """Law: psi eats exactly l(n, D) numbers and each of them matters; apply is the matrix; what is frozen is the same again.

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
        (grad,) = torch.autograd.grad((W * _rows(n, D, seed=seed + 1)).sum(), w, retain_graph=True)
        if not bool((grad != 0).all()):
            raise LawBroken(f"gradient: {int((grad == 0).sum())} of {l} entries of w have none; expected 0.")
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
    """Law: pi keeps leading axes and dtype, its rows do not mix, it eats exactly l(m, n) numbers and each of them matters."""
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
        (grad,) = torch.autograd.grad((y * _rows(*y.shape, seed=seed + 3)).sum(), w)
        if not bool((grad != 0).all()):
            raise LawBroken("gradient: an entry of w has none; expected one each.")
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
        (grad,) = torch.autograd.grad((y * _rows(*y.shape, seed=seed + 3)).sum(), w)
        if not bool((grad != 0).all()):
            raise LawBroken("gradient: an entry of w has none; expected one each.")
    agree("float32", u([x.float() for x in xs], None if w is None else w.detach().float(), n), y.detach().float())


def check_head(head: Head, seed: int = 0) -> None:
    """Law: a head is its formula on the full features and matrices; it survives being saved, copied and mapped; w matters.

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
    """Law: a new head's output has mean square 1 on standard normal rows (within the record's domain, where features have poles).

    Not asked of heads that have nothing to scale: no w, or an output that w does not reach.
    """
    span = span_of(head.expansion)
    x = _rows(rows, head.m, seed=seed)
    while not bool(((x >= span[0]) & (x <= span[1])).all()):
        x = torch.where((x >= span[0]) & (x <= span[1]), x, _rows(rows, head.m, seed=(seed := seed + 1)))
    found = float(copy.deepcopy(head).double()(x).detach().square().mean())
    if head.w.numel() and not abs(found - 1) <= tolerance:
        raise LawBroken(f"mean square: {found:.3f}; expected 1 within {tolerance}.")
