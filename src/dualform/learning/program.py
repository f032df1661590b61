"""The chunk program: what `derive` returns. Called on a sequence it runs the learner at test time.

Legend: B batch, T time, H heads, K key width, V value width, r registers, b the mini-batch (chunk).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dualform.bounded import Bounded
from dualform.catalogue import Bound, Catalogue
from dualform.graphs.fingerprint import Fingerprint
from dualform.graphs.this_thread import compiles
from dualform.graphs.twin import Twin
from dualform.learning import proof as proving
from dualform.learning import scan as scan_module
from dualform.learning.backends import backends_key
from dualform.learning.derive import TRACING, Derivation, Step, undisturbed
from dualform.learning.emit import Choice, Inner
from dualform.learning.explain import Account, account
from dualform.learning.finite import check_finite, policies
from dualform.learning.forms import forms
from dualform.learning.front_door import FrontDoor, Parts
from dualform.learning.grid import Variant
from dualform.learning.objectives import objectives
from dualform.learning.primal import primal
from dualform.learning.printer import Cost, cost_of, print_step
from dualform.learning.proof import Proof, cache_folder
from dualform.learning.rules import Rule, rules
from dualform.learning.sites import DerivationError
from dualform.learning.state import State
from dualform.learning.transforms import is_known
from dualform.shapes import ShapeError


class Inputs(NamedTuple):
    """A call, checked and cast; q, k, v and gates of fewer digits than are computed with stay as they are given."""

    learner: Any  # runs the learner on other tensors, for the definition alone
    objective: Callable[[Tensor, Tensor], Tensor]
    target: str
    rule: Rule
    chunk: int
    q: Tensor
    k: Tensor
    v: Tensor
    gates: dict[str, Tensor]  # (B, T, H); offset (chunk,)
    state: State
    mask: Tensor | None
    reset: Tensor | None
    slow: dict[str, Tensor]  # (H, ...)
    init: dict[str, Tensor]  # (H, ...)
    rest: dict[str, Tensor]  # buffers, and what is closed over: shared by heads

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return next(iter(self.init.values())).dtype

    def widened(self) -> Inputs:
        """Cast all tokens to what is computed in."""
        gates = {name: x.to(self.dtype) for name, x in self.gates.items()}
        return self._replace(q=self.q.to(self.dtype), k=self.k.to(self.dtype), v=self.v.to(self.dtype), gates=gates)

    def plain(self) -> Inputs:
        """Copy what was made in inference mode: the definition takes gradients."""

        def own(x: Any) -> Any:
            if isinstance(x, dict):
                return {name: own(t) for name, t in x.items()}
            if isinstance(x, State):
                return State(own(x.anchor), own(x.registers), own(x.position))
            return x.clone() if isinstance(x, Tensor) and x.is_inference() else x

        return self._replace(**{name: own(x) for name, x in self._asdict().items()})


@contextmanager
def _without_inference() -> Iterator[None]:
    """Out of inference mode, with gradients on where they were."""
    outer = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(outer):
        yield


class ChunkProgram(nn.Module):
    """A learner, an objective and a rule, ready to run over sequences; `print` it to read one mini-batch's code.

    A module like any other: its learner is its part, and so is an objective that is a module. What it derives follows them: a
    changed attribute, mode, closure or replaced parameter is seen at the next call.
    Shape:  q, k (B, T, H, K), v, o (B, T, H, V), gates {name: (B, T, H)}, offset (chunk,), mask, reset (B, T) bool.
    Dtype:  computes in float32, or float64 if q or the learner is; o has q's dtype, the state never less than float32.
    Raises: ShapeError for inputs that do not fit; DerivationError for a form that does not exist.
    Source: DESIGN sections 1 and 2 of this project.
    """

    def __init__(
        self,
        learner: nn.Module,
        objective: Callable[[Tensor, Tensor], Tensor],
        rule: Rule,
        chunk: int,
        slow: tuple[str, ...] = (),
        block: int | None = None,
        prove: bool = False,
        per_token: int | None = None,
    ) -> None:
        super().__init__()
        self.learner, self.objective, self.rule, self.chunk, self.slow, self.block = (
            learner, objective, rule, chunk, slow, block,
        )  # fmt: skip
        self.prove, self.per_token = prove, per_token
        self.proofs: dict[str, Proof] = {}
        self.door = FrontDoor(learner, objective, rule, slow)
        self.name = scan_module.register(self)
        self.plans: dict[Any, scan_module.Plan] = {}
        self.width: int | None = infer_width(learner)
        self.out_width: int | None = None
        self._derive()

    def _derive(self) -> None:
        if self.width is not None:
            self.plan(self.width, self._kind()[0], "auto")

    @property
    def parts(self) -> Parts:
        """The learner's tensors by role, and those that learner, objective and rule close over; live."""
        return self.door.parts

    def refresh(self) -> None:
        """Follow what has changed since the last call."""
        if compiles() or self.door.is_current():
            return
        with TRACING:
            if not self.door.is_current() and not self.door.read():
                self.plans.clear()
                self._derive()

    def _kind(self) -> tuple[torch.dtype, torch.device]:
        p = next(iter(self.parts.fast.values()))
        return torch.promote_types(torch.float32, p.dtype), p.device

    @property
    def target(self) -> str:
        return self.door.target

    def plan(self, K: int, dtype: torch.dtype, form: str) -> scan_module.Plan:
        """Return the derivation for a width, dtype and form, with its batched graphs; made once."""
        key = (K, dtype, form)
        found = self.plans.get(key)
        return self._planned(key) if found is None else found

    def plan_again(self, K: int, dtype: torch.dtype, form: str, retyped: bool) -> scan_module.Plan:
        """Make a plan anew: traced, or that of the learner's own dtype with the numbers' type exchanged."""
        source = (
            next((p for (k, t, f), p in self.plans.items() if (k, f) == (K, form) and t != dtype), None)
            if retyped
            else None
        )
        with TRACING:
            self.plans.pop((K, dtype, form), None)
            return self._planned((K, dtype, form), source)

    def _planned(self, key: tuple[int, torch.dtype, str], source: scan_module.Plan | None = None) -> scan_module.Plan:
        K, dtype, form = key
        with TRACING:
            if key not in self.plans:
                observed = form == "losses"
                inner = Inner(self.rule, self.target, "auto" if observed else form, observed)
                given = source and source.derivation
                build = partial(Derivation, self.door, inner, self.chunk, K, dtype, self.block, self.per_token, given)
                made = undisturbed(build)
                twin = _structures.setdefault(made.structure, scan_module.Plan(made))
                made.steps = twin.derivation.steps  # what was traced for one layer serves all layers like it
                plan = scan_module.Plan(made, twin.ways, twin.natives, twin.counts, source=source)
                plan.is_checked, plan.checked = proving.is_on(self.prove), twin.checked
                self.plans[key] = plan
                self.out_width = made.V if K == self.width else self.out_width
                if not observed and proving.is_on(self.prove):
                    self.proofs[form] = self._proof(made, form)
            return self.plans[key]

    def _proof(self, made: Derivation, form: str) -> Proof:
        """Prove a form, or remember that a structure like it was proved; a form that fails is not kept."""
        found = _proved.get(made.structure)
        if found is not None:
            return found
        device = next(iter(self.parts.fast.values())).device.type
        folder, key = cache_folder() / "proofs", proving.digest(made.structure, form, device)
        found = proving.recall(folder, key)
        if found is None:
            kept = dict(self.plans)  # what the proof makes beside them serves it alone
            try:
                found = undisturbed(partial(proving.prove, self, made.K, made.dtype, form), role="holds")
            except BaseException:
                self.plans = {k: plan for k, plan in kept.items() if k[2] != form}
                raise
            self.plans = kept
            proving.remember(folder, key, found)
        _proved[made.structure] = found
        return found

    @property
    def proof(self) -> Proof | None:
        """What was compared with the definition when this structure was first derived; None: nothing (prove=False)."""
        return self.proofs.get("auto")

    def in_blocks(self, block: int) -> ChunkProgram:
        """Return the same program computed so many tokens at once."""
        return ChunkProgram(self.learner, self.objective, self.rule, self.chunk, self.slow, block)

    def with_site_per_token(self, site: int) -> ChunkProgram:
        """Return the same program with one site's weights formed for every token."""
        return ChunkProgram(self.learner, self.objective, self.rule, self.chunk, self.slow, self.block, False, site)

    @property
    def tensor_names(self) -> tuple[list[str], list[str], list[str]]:
        """Names of the gates with a time axis, of the fast leaves, and of what is not fast."""
        gates = [name for name in self.rule.gates if name != "offset"]
        return gates, list(self.parts.fast), list(self.parts.rest)

    # -- running -------------------------------------------------------------------------------------------------

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Mapping[str, Tensor] | None = None,
        *,
        state: State | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        params: Mapping[str, Tensor] | None = None,
        form: str = "auto",
        backend: Any = "auto",
        remat: str | int | None = "auto",
        nan_policy: str = "propagate",
        overwrite: bool = False,
    ) -> tuple[Tensor, State]:
        """Run over a sequence and return (o, state).

        Shape:  see the class. A masked token has o = 0 and leaves the state alone; reset True: a document starts here.
                overwrite: the state given is not needed again; a step without gradients may leave the new one in its place.
        Raises: ShapeError, DerivationError; BackendError for a backend that cannot run this; under nan_policy="raise"
                NonFiniteError where the state is not finite, naming row, head and mini-batch (not inside torch.compile).
        """
        if form not in forms:
            raise DerivationError(f"program: form is {form!r}; expected one of {(*forms,)}. Choose one of these.")
        backend = backends_key(backend)
        if not (remat in ("auto", None) or (isinstance(remat, int) and remat > 0)):
            raise ShapeError(
                f"program: remat is {remat!r}; expected 'auto', None or mini-batches per checkpoint >= 1. Choose one of these."
            )
        if nan_policy not in policies:
            raise ShapeError(f"program: nan_policy is {nan_policy!r}; expected one of {policies}. Choose one of these.")
        self.refresh()
        call = self._inputs(q, k, v, gates or {}, state, mask, reset, params or {})
        if 0 in q.shape[:3]:
            return v.to(q.dtype), call.state
        if not forms[form].corrections:
            with torch.autocast(q.device.type, enabled=False), _without_inference():
                o, after = primal(call.widened().plain()._replace(learner=Twin(self.learner)))
        else:
            o, after = self._scan(form, backend, call, state is not None, remat, overwrite and nan_policy != "raise")
        if nan_policy == "raise" and all(map(is_known, after.tensors().values())):

            def after_tokens(n: int) -> State:
                def cut(x: Tensor | None) -> Tensor | None:
                    return None if x is None else x[:, :n]

                cut_gates = {name: x if name == "offset" else x[:, :n] for name, x in (gates or {}).items()}
                given = {"state": state, "mask": cut(mask), "reset": cut(reset), "params": params}
                with torch.no_grad():
                    return self(q[:, :n], k[:, :n], v[:, :n], cut_gates, **given, form=form, backend=backend)[1]

            check_finite(after, after_tokens, q.shape[1], self.chunk)
        return o.to(q.dtype), after

    def losses(
        self,
        k: Tensor,
        v: Tensor,
        gates: Mapping[str, Tensor] | None = None,
        *,
        state: State | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        params: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, State]:
        """Return each token's inner loss before and after its own update, and the state.

        before_t = loss(f(k_t; anchor), v_t): the one whose gradient is taken;  after_t = loss(f(k_t; theta_t), v_t)
        Shape:  k, v, gates, mask, reset as for a call -> before, after (B, T, H), 0 for padding.
        Dtype:  float32, or float64 if k or the learner is.
        Raises: ShapeError.
        """
        self.refresh()
        call = self._inputs(k, k, v, gates or {}, state, mask, reset, params or {})
        if 0 in k.shape[:3]:
            none = call.v.new_zeros(call.v.shape[:3], dtype=call.dtype)
            return none, none, call.state
        both, after = self._scan("losses", "auto", call, state is not None, "auto")
        return both[..., 0], both[..., 1], after

    def _scan(
        self, form: str, backend: str, call: Inputs, carried: bool, remat: str | int | None, overwrite: bool = False
    ) -> tuple[Tensor, State]:
        if not compiles():
            self.plan(call.q.shape[-1], call.dtype, form)  # outside the op, where whatever fails says why
            self._expect_fixed(call.rest)
        tensors = scan_module.Call(
            q=call.q,
            k=call.k,
            v=call.v,
            gates={name: x for name, x in call.gates.items() if name != "offset"},
            slow=call.slow | call.rest,
            anchor=call.state.anchor,
            registers=call.state.registers,
            position=call.state.position,
            init=call.init,
            offset=call.gates.get("offset"),
            mask=call.mask,
            reset=call.reset,
            carried=carried,
        )
        o, *held = scan_module.scan(self.name, form, backend, tensors, self.chunk, remat, overwrite)
        L, names = len(self.parts.fast), list(self.parts.fast)
        anchor, registers = dict(zip(names, held[:L], strict=True)), dict(zip(names, held[L : 2 * L], strict=True))
        return o, State(anchor, registers, held[2 * L])

    def _expect_fixed(self, rest: Mapping[str, Tensor]) -> None:
        """Refuse other values of a buffer than those that the graph was made for."""
        for name in self.door.fixed:
            own, x = self.parts.buffers[name], rest[name]
            if x is not own and not (is_known(x) and torch.equal(x, own.to(x))):
                raise ShapeError(
                    f"program: params[{name!r}] has other values than the learner's own buffer, which forward reads as numbers (an "
                    "index, a size, an if); expected the same. Write them into the learner's buffer, which derives again."
                )

    def initial_state(self, batch: int, heads: int, params: Mapping[str, Tensor] | None = None) -> State:
        """Return the state that a sequence starts from: every row at the initial weights, registers at their start."""
        dtype, device = self._kind()
        fast, _ = self._with_heads(params or {}, heads, dtype, device)
        return self._start(fast, batch)

    def _start(self, fast: Mapping[str, Tensor], B: int) -> State:
        anchor = {name: w.expand(B, *w.shape) for name, w in fast.items()}
        registers = {name: torch.stack([s * w for s in self.rule.start], 2) for name, w in anchor.items()}
        device = next(iter(fast.values())).device
        return State(anchor, registers, torch.zeros(B, dtype=torch.long, device=device))

    def _like(self, fast: Mapping[str, Tensor], B: int) -> State:
        """Return what a state looks like, of no memory of its own."""
        n = self.rule.num_registers
        anchor = {name: w.expand(B, *w.shape) for name, w in fast.items()}
        registers = {name: w[:, :, None].expand(*w.shape[:2], n, *w.shape[2:]) for name, w in anchor.items()}
        return State(anchor, registers, next(iter(fast.values())).new_zeros(B, dtype=torch.long))

    def _with_heads(
        self, params: Mapping[str, Tensor], H: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return fast and slow parameters with a head axis."""
        own = {**self.parts.fast, **self.parts.slow}
        for name in params:
            if name not in own and name not in self.parts.buffers:
                raise ShapeError(
                    f"program: params names {name!r}; expected some of {sorted(own)}. Use the learner's parameter names."
                )

        def lift(name: str, p: Tensor) -> Tensor:
            shape, given = own[name].shape, params.get(name, p)
            if given.shape == shape:
                given = given.expand(H, *shape)
            elif given.shape != (H, *shape):
                raise ShapeError(
                    f"program: params[{name!r}] has shape {tuple(given.shape)}; expected {tuple(shape)} or (heads, ...) = "
                    f"{(H, *shape)}. Pass one of the two."
                )
            return given.to(device, dtype)

        return {n: lift(n, p) for n, p in self.parts.fast.items()}, {n: lift(n, p) for n, p in self.parts.slow.items()}

    def _inputs(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Mapping[str, Tensor],
        state: State | None,
        mask: Tensor | None,
        reset: Tensor | None,
        params: Mapping[str, Tensor],
    ) -> Inputs:
        if q.ndim != 4:
            raise ShapeError(
                f"program: q has shape {tuple(q.shape)}; expected (batch, time, heads, K), 4 axes. Add the missing axes."
            )
        B, T, H, _ = q.shape
        if k.shape != q.shape:
            raise ShapeError(
                f"program: k has shape {tuple(k.shape)}; expected q's = {tuple(q.shape)}. Make them agree."
            )
        if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
            raise ShapeError(
                f"program: v has shape {tuple(v.shape)}; expected (batch, time, heads, V) = {(B, T, H, 'V')}. Make them agree."
            )
        if q.shape[3] == self.width and v.shape[3] != self.out_width:
            raise ShapeError(
                f"program: v has width {v.shape[3]}; expected the learner's output V = {self.out_width}. Make them agree."
            )
        for name, x in (("mask", mask), ("reset", reset)):
            if x is not None and (x.shape != (B, T) or x.dtype != torch.bool):
                raise ShapeError(
                    f"program: {name} has shape {tuple(x.shape)} and dtype {x.dtype}; expected (batch, time) = {(B, T)} of "
                    f"torch.bool. Pass {name}.bool() of that shape."
                )
        marks = {"k": k, "v": v, "mask": mask, "reset": reset, **{f"gates[{n!r}]": x for n, x in gates.items()}}
        for name, x in (marks | {f"state's {n}": x for n, x in (state.tensors() if state else {}).items()}).items():
            if x is not None and x.device != q.device:
                raise ShapeError(
                    f"program: {name} is on {x.device}; expected q's device = {q.device}. Move it there: .to({str(q.device)!r})."
                )
        dtype = torch.promote_types(torch.promote_types(torch.float32, q.dtype), self._kind()[0])
        fast, slow = self._with_heads(params, H, dtype, q.device)
        if state is not None:
            state = state if _fits(state, fast, B, self.rule.num_registers) else check_state(state, self._like(fast, B))
        return Inputs(
            learner=None,
            objective=self.objective,
            target=self.target,
            rule=self.rule,
            chunk=self.chunk,
            q=_tokens(q, dtype),
            k=_tokens(k, dtype),
            v=_tokens(v, dtype),
            gates=self._gates(gates, (B, T, H), dtype, q.device),
            state=self._start(fast, B) if state is None else state,
            mask=mask,
            reset=reset,
            slow=slow,
            init=fast,
            rest={n: self._buffer(n, params.get(n, x), dtype, q.device) for n, x in self.parts.buffers.items()}
            | {n: x.to(q.device) for n, x in self.parts.closed.items()},
        )

    def _buffer(self, name: str, x: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        wanted = self.parts.buffers[name].shape
        if x.shape != wanted:
            raise ShapeError(
                f"program: params[{name!r}] has shape {tuple(x.shape)}; expected the buffer's {tuple(wanted)}, shared by heads. "
                "Pass that."
            )
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)

    def _gates(
        self, gates: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        for name in gates:
            if name not in self.rule.gates:
                raise ShapeError(
                    f"program: gates has {name!r}; expected gates of the rule ({self.rule.name}) = {self.rule.gates}. Drop it, or "
                    "use a rule that has it (momentum and decay: give SGD a nonzero constant)."
                )
        found = {}
        for name in self.rule.gates:
            wanted = (self.chunk,) if name == "offset" else shape
            x = gates.get(name)
            if x is None:
                x = torch.full(wanted, self.rule.default(name), dtype=dtype, device=device)
            x = x.to(dtype) if name == "offset" else _tokens(x, dtype)
            if x.shape != wanted:
                raise ShapeError(
                    f"program: gates[{name!r}] has shape {tuple(x.shape)}; expected {wanted}. Pass one value each."
                )
            found[name] = x
        return found

    # -- reading -------------------------------------------------------------------------------------------------

    @property
    def _shown(self) -> scan_module.Plan:
        """The plan that is printed: at the inferred width, in the learner's dtype."""
        if self.width is None:
            raise DerivationError(
                "derive: the learner's input width K cannot be told from its parameters; expected an attribute `dim` or a call. "
                "Set learner.dim = K, or call the program once."
            )
        return self.plan(self.width, self._kind()[0], "auto")

    @property
    def derivation(self) -> Derivation:
        """The derivation that is printed."""
        return self._shown.derivation

    @property
    def step(self) -> Step:
        # Of the plan, which traces out of sight: torch 2.11's export prints each module while it traces.
        return self._shown.step(Variant(self.chunk, fresh=True, dense=True, opens=False))

    def schedule(self, backend: Any = "cpp") -> Any:
        """Say what a backend that generates code makes of one whole mini-batch: a part per direction, with its source.

        Shape:  none.
        Dtype:  none.
        Raises: DerivationError for a backend that runs the graphs as they are.
        """
        whole = scan_module.found(backends_key(backend, "program.schedule")).whole
        if whole is None:
            raise DerivationError(
                f"program.schedule: backend is {backend!r}; expected one that generates code, as 'cpp'. Print the program instead."
            )
        return whole.schedule(self._shown, Variant(self.chunk, True, True, False))

    @property
    def code(self) -> str:
        """One whole mini-batch for one head as Python that runs when pasted."""
        return print_step(self.step, self.derivation)

    def __str__(self) -> str:
        return self.code

    def __repr__(self) -> str:
        return f"ChunkProgram({type(self.learner).__name__}, rule={self.rule.name!r}, chunk={self.chunk})"

    @property
    def forms(self) -> dict[str, str | None]:
        """Each form by name: None if it applies, or the learner's line and why it does not; `form="auto"` takes what is cheapest."""
        return self.derivation.forms()

    @property
    def sites(self) -> list[Choice]:
        """Where the weights meet the data, with the form that each took and what the others cost."""
        return self.step.choices

    def explain(self, level: str = "steps") -> Account:
        """Explain the derivation: level "one-line", "steps" (sites, derivatives, forms, costs) or "proof" (and the code)."""
        words = scan_module.chosen_in_words(self.plan(self.derivation.K, self.derivation.dtype, "auto"))
        proof = str(self.proof or "none: prove=False, or DUALFORM_PROVE=0")
        return account(self.learner, self.derivation, self.step, self.cost, self.code, level, words, proof)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what it was made of; who reads it derives it again."""
        return ChunkProgram, (self.learner, self.objective, self.rule, self.chunk, self.slow, self.block, self.prove)

    def __fingerprint__(self) -> tuple[Any, ...]:
        return self.learner, self.objective, self.rule, self.chunk, self.slow

    @property
    def cost(self) -> Cost:
        """Work and memory of one mini-batch for one head, forward."""
        return cost_of(self.step, self.rule.num_registers)


def _tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast what is read token by token, unless each backend can widen it while it reads."""
    return x if x.dtype in _narrow and torch.promote_types(x.dtype, dtype) == dtype else x.to(dtype)


_narrow = (torch.bfloat16, torch.float16, torch.float32)


def _fits(state: State, fast: Mapping[str, Tensor], B: int, r: int) -> bool:
    """Is a state what `check_state` would let through as it is?"""
    if list(state.anchor) != list(fast) or list(state.registers) != list(fast) or state.position.shape != (B,):
        return False
    held = ((state.anchor[name], state.registers[name], w) for name, w in fast.items())
    return state.position.dtype == torch.long and all(
        a.shape == (B, *w.shape) and g.shape == (B, w.shape[0], r, *w.shape[1:]) and a.dtype == g.dtype == w.dtype
        for a, g, w in held
    )


def check_state(state: State, like: State) -> State:
    """Refuse a state of another model, shape or dtype; cast nothing."""
    if set(state.anchor) != set(like.anchor):
        raise ShapeError(
            f"program: state holds the leaves {sorted(state.anchor)}; expected the learner's = {sorted(like.anchor)}. It belongs "
            "to another model: pass a state that this program returned."
        )
    for name, x in state.tensors().items():
        wanted = like.tensors()[name]
        if x.shape != wanted.shape or x.dtype != wanted.dtype:
            raise ShapeError(
                f"program: state's {name} has shape {tuple(x.shape)} and dtype {x.dtype}; expected {tuple(wanted.shape)} and "
                f"{wanted.dtype}. Pass a state of this batch and these heads (state.select, state.fork, state.to)."
            )
    return replace(
        state, anchor={n: state.anchor[n] for n in like.anchor}, registers={n: state.registers[n] for n in like.anchor}
    )


# Runs of a learner at widths that its tensors may show, and at small ones; beyond these, the first call shows it.
_TRIALS = 32


def infer_width(learner: nn.Module) -> int | None:
    """Find the width of the rows that a learner takes: what it says, or what its tensors show, if it runs at that."""
    said = [n for name in ("dim", "in_features", "K") if isinstance(n := getattr(learner, name, None), int)]
    shapes = [p.shape for p in itertools.chain(learner.parameters(), learner.buffers())]
    sizes = list(dict.fromkeys(n for shape in shapes for n in shape))
    own = [n for m in learner.modules() for n in vars(m).values() if type(n) is int and n > 0]
    products = [a * b for a, b in itertools.combinations_with_replacement(sizes, 2)]
    shown = list(dict.fromkeys([*said, *sizes, *own, *products]))[:_TRIALS]
    candidates = dict.fromkeys([*shown, *range(1, _TRIALS + 1)])
    return next((K for K in candidates if _runs(learner, K)), said[0] if said else None)


def _runs(learner: nn.Module, K: int) -> bool:
    p = next(learner.parameters(), torch.empty(()))
    buffers = {name: b.clone() for name, b in learner.named_buffers()}  # a trial writes to none of the learner's
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            found = Twin(learner)(buffers, torch.zeros(3, K, dtype=p.dtype, device=p.device))
            return not isinstance(found, Tensor) or found.shape[:1] == (3,)
    except Exception:
        return False


# Programs by learner, and traced steps by structure.
_programs: Bounded[ChunkProgram] = Bounded(256)
_structures: Bounded[scan_module.Plan] = Bounded(256)
_proved: Bounded[Proof] = Bounded(1024)


def derive(
    learner: nn.Module,
    objective: Any = "squared",
    rule: Any = "sgd",
    *,
    chunk: int = 16,
    slow: tuple[str, ...] = (),
    block: int | None = None,
    prove: bool = True,
) -> ChunkProgram:
    """Derive a chunk program from an inner model: its gradients, its dual form where one exists, its state.

    th <- mini-batch of `chunk` tokens <- gradients at th; outputs with each token's own weights
    Shape:  learner maps rows (..., K) -> (..., V), K != V allowed; its parameters are fast unless `slow` (fnmatch) or the
            module's own attribute `slow` names them. block: at most so many tokens are computed at once (any value gives
            the same results). prove: the first time a structure is seen, compare the derived form with the definition in outputs,
            state and outer gradients (`program.proof`; about a second, remembered on disk); DUALFORM_PROVE=0 switches it off.
    Dtype:  see ChunkProgram.
    Raises: DerivationError if tokens mix, randomness is active or buffers are written, naming the learner's line, and where the
            proof finds a difference.
    Source: DESIGN section 1 of this project.
    Example:
        >>> import dualform as df, torch
        >>> program = df.derive(df.learners.MLP(depth=2)(8), chunk=4)
        >>> x = torch.randn(2, 10, 3, 8)
        >>> o, state = program(x, x, x)
        >>> o.shape, state.position
        (torch.Size([2, 10, 3, 8]), tensor([2, 2]))
    """
    if not isinstance(learner, nn.Module):
        raise DerivationError(
            f"derive: learner is a {type(learner).__name__}; expected a built nn.Module. Call the recipe with a width: spec(dim)."
        )
    for name, x in (("chunk", chunk), ("block", block)):
        if not (isinstance(x, int) and not isinstance(x, bool) and x >= 1) and not (name == "block" and x is None):
            raise DerivationError(
                f"derive: {name} is {x!r}; expected a number of tokens, a whole number >= 1. Pass a positive int."
            )
    loss = _resolved(objectives, objective, Callable)
    built = _resolved(rules, rule, Rule)
    frozen = tuple(name for name, p in learner.named_parameters() if not p.requires_grad)
    with TRACING:
        reading = Fingerprint(learner, loss, built).key or object()
        key = (id(learner), id(loss), id(built), reading, chunk, tuple(slow), block, prove, frozen)
        if key not in _programs:
            _programs[key] = ChunkProgram(learner, loss, built, chunk, tuple(slow), block, prove)
        return _programs[key]


def _resolved(catalogue: Catalogue, spec: Any, kind: Any) -> Any:
    """Return what a spec builds, the same object for equal specs; pass on what is built already."""
    if isinstance(spec, kind) and not isinstance(spec, Bound):
        return spec
    return _built(catalogue.build(spec))


@lru_cache(maxsize=256)
def _built(bound: Bound) -> Any:
    return bound.build()
