"""From a learner to its chunk program: trace, find sites, emit one block for one head, trace that.

Everything here works for any module; the sizes of a block (`Variant`) are the only thing a trace is specialised to.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_aggregate
from torch.utils import _pytree

from dualform.graphs.edit import copied, output_of, results_of, stepped, writes
from dualform.graphs.hollow import leaves_in
from dualform.graphs.kept import written_out
from dualform.graphs.recorder import CannotRecord, record
from dualform.graphs.regroup import join_products
from dualform.graphs.simplify import tidy
from dualform.graphs.trace import source_line
from dualform.graphs.whole_norms import whole_norms
from dualform.learning.emit import Choice, Emitter, Inner, StepInputs
from dualform.learning.flat_leaves import InPieces, Ranges, cut_leaves
from dualform.learning.forms import Form, forms
from dualform.learning.front_door import FrontDoor, Routine
from dualform.learning.grid import Variant
from dualform.learning.reassociate import reassociate
from dualform.learning.roles import Roles
from dualform.learning.sites import Analysis, DerivationError, mark, op_name
from dualform.learning.transforms import undisturbed
from dualform.ops.table import definitions
from dualform.storages import like

aten = torch.ops.aten
Table = dict[Any, Callable[..., Any]]


def slopes_as_arithmetic() -> Table:
    """Decompose what vmap does not map as it is; derivatives of activations become slope times gradient."""
    return definitions("mapped") | {op: _uncast(f) for op, f in definitions("sloped").items()}


def _uncast(f: Callable[..., Any]) -> Callable[..., Any]:
    """One of torch's definitions, which widens two-byte numbers; around it, what finds the types loads sympy."""

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (inspect.unwrap(f) if x.dtype in (torch.float32, torch.float64) else f)(x, *args, **kwargs)

    return run


@dataclass(eq=False)
class TracedStep:
    """A traced block for one head: the graph, the tree of its inputs, what was chosen per site; and its reverse."""

    graph: fx.GraphModule
    inputs: StepInputs  # examples, for shapes and names
    choices: list[Choice]

    def __post_init__(self) -> None:
        self.num_outputs = len(results_of(self.graph.graph))

    @cached_property
    def wants(self) -> list[bool]:
        """Which inputs have gradients: all but positions, validity and truth values."""
        parts = [part for part, value in self.inputs._asdict().items() for _ in flatten(value)]
        tensors = flatten(self.inputs)
        return [x.is_floating_point() and p not in ("i", "valid") for p, x in zip(parts, tensors, strict=True)]

    @cached_property
    def plain(self) -> fx.GraphModule:
        """The same block for running: functions with gradients of their own are written out."""
        return written_out(self.differentiable)

    @cached_property
    def differentiable(self) -> fx.GraphModule:
        """The same block for differentiating: norms are whole, slopes of activations are arithmetic.

        A slope that is a product shows what does not wait for the state; as one op with the gradient it would all wait.
        """

        def make() -> fx.GraphModule:
            gm = tidy(trace_fake(stepped(self.graph), flatten(self.inputs), slopes_as_arithmetic()))
            whole_norms(gm.graph)
            join_products(gm.graph)
            return gm

        return undisturbed(make)

    @cached_property
    def reverse(self) -> fx.GraphModule:
        """The vjp, as a graph: (inputs, cotangents of the outputs) -> gradients of the inputs that have one."""
        inputs, wants, block = flatten(self.inputs), self.wants, stepped(self.differentiable)
        output: Any = output_of(self.graph.graph)
        cotangents = [inputs[0].new_empty(node.meta["val"].shape) for node in output.args[0]]

        def run(*tensors: Tensor) -> list[Tensor]:
            given = [x.detach().requires_grad_(w) for x, w in zip(tensors, wants, strict=False)]
            leaves = [x for x, w in zip(given, wants, strict=True) if w]
            total = _Seeded.apply(tensors[len(given) :], *block(*given))
            return list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))

        return undisturbed(lambda: written_out(tidy(trace_fake(run, [*inputs, *cotangents], slopes_as_arithmetic()))))


def retyped(gm: fx.GraphModule, old: torch.dtype, new: torch.dtype) -> fx.GraphModule:
    """Copy a graph with numbers of another dtype; one that names no dtype serves every one."""
    if not any(x is old for node in gm.graph.nodes for x in leaves_in(node.args, node.kwargs)):
        return gm
    cast, gm = partial(_cast, old=old, new=new), copied(gm)
    for node in gm.graph.nodes:
        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), cast)
        if "val" in node.meta:
            node.meta["val"] = map_aggregate(node.meta["val"], cast)
    return gm


def _cast(x: Any, old: torch.dtype, new: torch.dtype) -> Any:
    if isinstance(x, Tensor):
        return x.to(new) if x.dtype == old else x
    return new if x is old else x


class _Seeded(torch.autograd.Function):
    """A number whose gradients by some tensors are given. (To be told gradients, torch.autograd.grad loads sympy.)"""

    @staticmethod
    def forward(ctx: Any, cotangents: tuple[Tensor, ...], *outputs: Tensor) -> Tensor:
        ctx.cotangents = cotangents
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]: so torch's docs
        return None, *ctx.cotangents


@dataclass(eq=False)
class Derivation:
    """What came in by the front door, at one width and dtype; steps are traced as they are asked for."""

    door: FrontDoor
    inner: Inner
    chunk: int
    K: int
    dtype: torch.dtype
    block: int | None = None
    per_token: int | None = None  # a site whose weights are to be formed per token, whatever it allows
    source: Derivation | None = None  # the same in another dtype, whose graphs are taken
    parts: Roles = field(init=False)
    V: int = field(init=False, default=0)
    out_width: int = field(init=False, default=0)  # how many numbers a token's result has
    constants: dict[str, Tensor] = field(default_factory=dict)
    cut: Ranges = field(default_factory=dict)  # leaves that are only ever sliced, in pieces
    analyses: dict[int, Analysis] = field(default_factory=dict)
    losses: dict[int, Routine] = field(default_factory=dict)
    rules: dict[int, Routine] = field(default_factory=dict)
    steps: dict[Variant, TracedStep] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parts = self.door.parts
        if self.source is not None:
            self.V, self.constants, self.cut = self.source.V, self.source.constants, self.source.cut
            self.out_width = self.source.out_width
            self.analyses, self.losses, self.rules = self.source.analyses, self.source.losses, self.source.rules
            return
        proof = self.analysis(self._proved)
        self.V = proof.output.meta["val"].shape[-1]
        self.out_width = 2 if self.inner.observed else self.V
        if self.inner.target == "v-k" and self.V != self.K:
            raise DerivationError(
                f"derive: the objective's target is v - k with K = {self.K}, V = {self.V}; expected K = V. Use "
                "target='v'."
            )
        self.loss(self._proved)
        self.rule(self._proved)
        # A size that happens to be the mini-batch's is none of the tokens': they are proved apart at a number that no
        # size has a factor of, too.
        tensors = (*self.parts.fast.values(), *self.slow_values().values())
        sizes = {self.K, self.V, *(n for x in tensors for n in x.shape)}
        W = next(n for n in itertools.count(self._proved + 1) if all(math.gcd(n, size) == 1 for size in sizes - {0}))
        other = self.door.trace_learner(W, self.K, self.dtype).output.meta["val"].dtype
        self.door.trace_objective(W, self.V, other, self.dtype)
        self.door.trace_rule(W, self.dtype)
        if any(not site.admissible for site in proof.sites):
            assert self.alone.sites  # what one token cannot do is said here
        form = forms[self.inner.form]
        if why := form.applies(self.inner.rule, proof):
            raise DerivationError(
                f"derive: form={form.name!r} does not exist at {why}; expected {form.expected}. Use form='auto' "
                "(weights per token there)."
            )

    def forms(self) -> dict[str, str | None]:
        """Say for each form why it does not apply; None if it does."""

        def why(form: Form) -> str | None:
            W = self._proved
            return form.applies(self.inner.rule, reassociate(self.as_written(W), W, always=form.reassociates))

        return undisturbed(lambda: {name: why(form) for name, form in forms.items() if name != "auto"})

    @property
    def _proved(self) -> int:
        """Tokens of the traces that prove them apart: with one token nothing can be seen to mix."""
        return max(2, self.chunk)

    @property
    def structure(self) -> Any:
        """What decides a trace: the three graphs and shapes; equal for layers that are alike."""
        W, rule = self._proved, self.inner.rule
        named = [(n, tuple(x.shape), x.dtype) for n, x in (*self.parts.fast.items(), *self.slow_values().items())]
        return (
            self.analyses[W].graph.code, self.losses[W].text, self.rules[W].text, rule.gates, rule.start, rule.resets,
            tuple(named), len(self.parts.fast), *self.inner[1:], self.chunk, self.K, self.dtype, self.per_token,
            self.source is None,
        )  # fmt: skip

    def analysis(self, W: int) -> Analysis:
        """Trace and mark the learner at W tokens, re-associated where that is better."""
        if W not in self.analyses:
            a = self.as_written(W)
            if self.per_token is None:
                a = reassociate(a, W, always=forms[self.inner.form].reassociates)
            else:
                a.sites[self.per_token].why = "it was asked for"
            self.analyses[W] = a
        return self.analyses[W]

    def site_lines(self) -> list[str]:
        """Name the learner's line of every site."""
        return [source_line(site.node) or op_name(site.node) for site in self.as_written(self._proved).sites]

    def as_written(self, W: int) -> Analysis:
        """Trace and mark the learner at W tokens."""
        a = self.door.trace_learner(W, self.K, self.dtype)
        self.cut = cut_leaves(a)
        if self.cut:
            mark(a, W)
        self.constants |= a.constants
        return a

    @cached_property
    def alone(self) -> Analysis:
        """The learner at one token."""
        return self.as_written(1)

    def loss(self, W: int) -> Routine:
        """Trace the objective at W tokens."""
        if W not in self.losses:
            prediction = self.analysis(W).output.meta["val"]
            self.losses[W] = self.door.trace_objective(W, self.V, prediction.dtype, self.dtype)
            self.constants |= self.losses[W].analysis.constants
        return self.losses[W]

    def rule(self, W: int) -> Routine:
        """Trace the rule at W tokens."""
        if W not in self.rules:
            self.rules[W] = self.door.trace_rule(W, self.dtype)
            self.constants |= self.rules[W].analysis.constants
        return self.rules[W]

    def step(self, variant: Variant) -> TracedStep:
        """Trace one block for one head."""
        if variant not in self.steps and self.source is not None:
            self.steps[variant] = self.source.step(variant)  # for what it says of its inputs
        if variant not in self.steps:
            many = self.analysis(variant.width)
            needs_one = any(not site.admissible for site in many.sites)
            one, W = self.alone if needs_one else None, variant.width
            emitter = Emitter(self.inner, many, one, self.loss(W), self.rule(W), variant, self.chunk)
            example = self.example(variant)
            whole = InPieces(emitter, self.cut) if self.cut else emitter
            self.steps[variant] = TracedStep(trace_flat(whole, example), example, emitter.choices)
        return self.steps[variant]

    def slow_values(self) -> dict[str, Tensor]:
        return {**self.parts.rest, **self.constants}

    def example(self, variant: Variant) -> StepInputs:
        """Make inputs of a block's shapes, for tracing."""
        rule, W = self.inner.rule, variant.width
        _ = self.analysis(W), self.loss(W), self.rule(W)  # which find what is closed over

        def new(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=self.dtype, device="cpu")

        th = {n: like(p, self.dtype) for n, p in self.parts.fast.items()}
        known = variant.fresh and all(rule.resets) and not variant.opens
        slow = {n: like(p, self.dtype) for n, p in {**self.parts.slow, **self.parts.buffers}.items()}
        slow |= {n: like(p, p.dtype) for n, p in {**self.parts.closed, **self.constants}.items()}
        truth = torch.empty((), dtype=torch.bool, device="cpu")
        return StepInputs(
            th, None if known else {n: new(rule.num_registers, *w.shape) for n, w in th.items()},
            new(W, self.K), new(W, self.K), new(W, self.V), {name: new(W) for name in rule.gates}, slow,
            i=None if variant.fresh else new(W), valid=None if variant.dense else new(W),
            full=None if variant.completes(self.chunk) else truth, opens=truth.clone() if variant.opens else None,
            init={n: new(*w.shape) for n, w in th.items()} if variant.opens else None,
        )  # fmt: skip


def flatten(inputs: Any) -> list[Tensor]:
    """List a tree's tensors."""
    return [x for x in _pytree.tree_leaves(inputs) if isinstance(x, Tensor)]


def rebuild(like: StepInputs, tensors: list[Any]) -> StepInputs:
    """Put tensors back into the tree of `like`."""
    leaves, spec = _pytree.tree_flatten(like)
    source = iter(tensors)
    return _pytree.tree_unflatten([next(source) if isinstance(x, Tensor) else x for x in leaves], spec)


def trace_flat(step: Callable[[StepInputs], Any], example: StepInputs) -> fx.GraphModule:
    """Trace a function of `StepInputs` into a graph over its tensors, cleaned."""

    def flat(*tensors: Tensor) -> list[Tensor]:
        return flatten(step(rebuild(example, list(tensors))))

    return tidy(trace_fake(flat, flatten(example)))


def trace_fake(f: Callable[..., Any], tensors: list[Tensor], table: Table | None = None) -> fx.GraphModule:
    """Trace on shapes alone, outside any autocast or grad mode of the caller, into a graph without in-place ops.

    table: what is decomposed; None: what vmap does not map as it is (norms, reads and writes at places).
    """
    table = definitions("mapped") if table is None else table
    try:
        gm = record(f, tensors, table)
    except (CannotRecord, RuntimeError):  # torch's own tracer knows more, and refuses in its own words
        gm = _traced_by_torch(f, tensors, table)
    _plain_views(gm)
    return gm


def _traced_by_torch(f: Callable[..., Any], tensors: list[Tensor], table: Table) -> fx.GraphModule:
    with FakeTensorMode():  # a recording's tensors are on meta
        tensors = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) if x.is_meta else x for x in tensors]
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        gm = make_fx(f, decomposition_table=table, tracing_mode="fake")(*tensors)
        if any(writes(node) for node in gm.graph.nodes):  # torch's double backwards fill and scale in place
            with torch.no_grad():
                gm = make_fx(functionalize(gm, remove="mutations"), tracing_mode="fake")(*tensors)
    return gm


def _plain_views(gm: fx.GraphModule) -> None:
    """Write as_strided as the view it is: its derivative writes through strides, which cannot be mapped over rows."""
    for node in gm.graph.nodes:
        if node.target is aten.as_strided.default:
            x, made = node.args[0].meta["val"], node.meta["val"]
            if x.is_contiguous() and made.is_contiguous() and x.numel() == made.numel():
                node.target, node.args, node.kwargs = aten.view.default, (node.args[0], list(made.shape)), {}
    gm.recompile()
