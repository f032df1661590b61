"""The chunk program: what `derive` returns. Called on a sequence it runs the learner at test time.

Legend: B batch, T time, H heads, K key width, V value width, r registers, b the mini-batch (chunk).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from dualform.bounded import Bounded
from dualform.caches import cache_folder
from dualform.catalogue import Bound, Catalogue, Record
from dualform.graphs.draws import undrawn
from dualform.graphs.fingerprint import Fingerprint
from dualform.graphs.this_thread import compiles
from dualform.graphs.twin import Twin
from dualform.learning import proof as proving
from dualform.learning.backends import Code, backend_of, backends_key, chosen_in_words
from dualform.learning.call import Call, Signature, expect_width, started
from dualform.learning.derive import Derivation, TracedStep
from dualform.learning.emit import Choice, Inner
from dualform.learning.explain import Account, account
from dualform.learning.finite import check_finite, policies
from dualform.learning.forms import forms
from dualform.learning.front_door import FrontDoor
from dualform.learning.grid import Variant
from dualform.learning.objectives import expect_two_arguments, objectives
from dualform.learning.op import followed, register, scan
from dualform.learning.plan import Plan
from dualform.learning.primal import primal
from dualform.learning.printer import Cost, cost_of, print_step
from dualform.learning.proof import Proof
from dualform.learning.roles import Roles, patterns
from dualform.learning.rules import Rule, rules
from dualform.learning.sites import DerivationError
from dualform.learning.standing import Written, as_they_stand, expect_fixed, note_places, put_back
from dualform.learning.state import State
from dualform.learning.transforms import TRACING, is_known, undisturbed
from dualform.learning.width import infer_width
from dualform.shapes import ShapeError, is_whole, require


class ChunkProgram(nn.Module):
    """A learner, an objective and a rule, ready to run over sequences; `print` it to read one mini-batch's code.

    A module like any other: its learner is its part, and so is an objective that is a module. What it derives follows
    them: a changed attribute, mode, closure or replaced parameter is seen at the next call.
    Shape:  q, k (B, T, H, K), v, o (B, T, H, V), gates {name: (B, T, H)}, offset (chunk,), mask, reset (B, T) bool.
    Dtype:  computes in float32, or float64 if one of q, k, v and the fast weights is; o has q's dtype, the state never
            less than float32; gates are cast.
    Raises: ShapeError for inputs that do not fit; DerivationError for a form that does not exist.
    Source: DESIGN sections 1 and 2 of this project.
    """

    def __init__(
        self, learner: nn.Module, objective: Callable[[Tensor, Tensor], Tensor], rule: Rule, chunk: int,
        slow: tuple[str, ...] = (), block: int | None = None, prove: bool = False, per_token: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.learner, self.objective, self.rule, self.chunk, self.slow, self.block = (
            learner, objective, rule, chunk, slow, block,
        )  # fmt: skip
        self.prove, self.per_token = prove, per_token
        self.proofs: dict[str, Proof] = Written()
        self.places: dict[str, str] = Written()
        self.door = FrontDoor(learner, objective, rule, slow)
        self.name = register(self)
        self.plans: dict[Any, Plan] = Written()
        self._compared: dict[str, Any] = Written()  # buffers that were given last, and in what state
        with undrawn(self.door.reading.generators):
            self.width: int | None = infer_width(learner)
        self.out_width: int | None = None
        self._derive()

    def _derive(self) -> None:
        # A layer's objective is converted with it, the module that its learner is traced on is not.
        own = self.objective.parameters() if isinstance(self.objective, nn.Module) else ()
        dtype = self.signature.computed_in(*(x for x in own if x.is_floating_point()))
        if self.width is not None:
            self.plan(self.width, dtype, "auto")
        else:  # the rule's mistakes are no less known
            undisturbed(lambda: [self.door.trace_rule(max(2, self.chunk) + n, dtype) for n in range(2)])

    @property
    def parts(self) -> Roles:
        """The learner's tensors by role, and those that learner, objective and rule close over; live."""
        return as_they_stand(self, self.door.parts, self.places) if compiles() else self.door.parts

    def as_read(self) -> AbstractContextManager[None]:
        """Stand, while a trace runs, as when it was read."""
        return put_back(self, self.door.parts, self.places)

    def refresh(self) -> None:
        """Follow what has changed since the last call."""
        if compiles():
            followed(self.name, tuple(part.training for part in self.modules()))  # modes: asked for at each call
        elif not self.door.is_current():
            self.follow()

    def follow(self) -> None:
        """Read anew what has changed; derive anew if it is another function."""
        with TRACING:
            if not self.door.is_current():
                if not self.door.read():
                    self.plans.clear()
                    self._derive()
                note_places(self.places, self, self.door.parts.closed)

    @property
    def signature(self) -> Signature:
        """What the program takes, as it is now."""
        return Signature(self.parts, self.rule, self.chunk, self.width, self.out_width)

    @property
    def target(self) -> str:
        return self.door.target

    def plan(self, K: int, dtype: torch.dtype, form: str) -> Plan:
        """Return the derivation for a width, dtype and form, with its batched graphs; made once."""
        key = (K, dtype, form)
        found = self.plans.get(key)
        return self._planned(key) if found is None else found

    def plan_again(self, K: int, dtype: torch.dtype, form: str, retyped: bool) -> Plan:
        """Return a plan as traced, or make that of the learner's own dtype with the numbers' type exchanged."""
        key, there = (K, dtype, form), self.plans.get((K, dtype, form))
        if there is not None and not retyped and there.source is None:
            return there
        own = (p for (k, t, f), p in self.plans.items() if (k, f) == (K, form) and t != dtype)
        source = next(own, None) if retyped else None
        with TRACING:
            self.plans.pop(key, None)
            return self._planned(key, source)

    def _planned(self, key: tuple[int, torch.dtype, str], source: Plan | None = None) -> Plan:
        K, dtype, form = key
        with TRACING:
            if key not in self.plans:
                observed = form == "losses"
                inner = Inner(self.rule, self.target, "auto" if observed else form, observed)
                given = source and source.derivation
                build = partial(Derivation, self.door, inner, self.chunk, K, dtype, self.block, self.per_token, given)
                made = undisturbed(build)
                if self.door.key is not None and not self.door.is_current() and not self.door.read():
                    self.plans.clear()  # a table that the first call keeps is one that was there before
                    made = undisturbed(build)
                twin = _structures.setdefault(self._structure(made), Plan(made))
                made.steps = twin.derivation.steps  # what was traced for one layer serves all layers like it
                note_places(self.places, self, self.door.parts.closed)
                self.plans[key] = Plan(
                    made, twin.ways, twin.natives, is_checked=proving.is_on(self.prove), source=source
                )
                self.out_width = made.V if K == self.width else self.out_width
                if not observed and proving.is_on(self.prove):
                    self.proofs[form] = self._proof(made, form)
            return self.plans[key]

    def _proof(self, made: Derivation, form: str) -> Proof:
        """Prove a form, or remember that a structure like it was proved; a form that fails is not kept."""
        if (none := proving.without_numbers({**self.parts.buffers, **self.parts.closed}, form)) is not None:
            return none
        found = _proved.get(self._structure(made))
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
                kept = {k: plan for k, plan in kept.items() if k[2] != form}
                raise
            finally:
                self.plans.clear()
                self.plans.update(kept)
            proving.remember(folder, key, vars(found))
        _proved[self._structure(made)] = found
        return found

    def _structure(self, made: Derivation) -> Any:
        """What decides all traces: where sizes are read, who reads them may be another function where none was made."""
        return made.structure, (self.door.key or object()) if self.door.asks else None

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
        return gates, list(self.parts.fast), [*self.parts.slow, *self.parts.buffers, *self.parts.closed]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Mapping[str, Tensor] | None = None, *, state: State | None = None,
        mask: Tensor | None = None, reset: Tensor | None = None, cu_seqlens: Tensor | None = None,
        params: Mapping[str, Tensor] | None = None, form: str = "auto", backend: Any = "auto",
        remat: str | int | None = "auto", nan_policy: str = "propagate", overwrite: bool = False,
    ) -> tuple[Tensor, State]:  # fmt: skip
        """Run over a sequence and return (o, state).

        Shape:  see the class. A masked token has o = 0 and leaves the state alone; reset True: a document starts here.
                cu_seqlens (n + 1,) instead of reset, 0 ... T: the ends of n documents packed into one row, B = 1. The
                first goes on from the state given; the state returned is that of the last one that has a token.
                overwrite: the state given is not needed again;
                a step without gradients may leave the new one in its place.
        Raises: ShapeError, DerivationError; BackendError for a backend that cannot run this; under nan_policy="raise"
                NonFiniteError where the state is not finite, naming row,
                head and mini-batch (not inside torch.compile).
        """
        self.refresh()
        call = self.signature.call(q, k, v, gates, state, mask, reset, params, cu_seqlens)
        o, after = self._run(call, form, backends_key(backend), remat, nan_policy, overwrite, params)
        return o.to(q.dtype), after

    def _run(
        self, call: Call, form: str, backend: str, remat: str | int | None, nan_policy: str, overwrite: bool,
        params: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, State]:  # fmt: skip
        if not isinstance(form, str) or form not in forms:
            raise DerivationError(f"program: form is {form!r}; expected one of {(*forms,)}. Choose one of these.")
        if not (remat in ("auto", None) or is_whole(remat)):
            raise ShapeError(
                f"program: remat is {remat!r}; expected 'auto', None or mini-batches per checkpoint >= 1. Choose one "
                "of these."
            )
        if not isinstance(overwrite, bool):
            require(False, "program", "overwrite", overwrite, "True or False", "Pass one of them.")
        if nan_policy not in policies:
            raise ShapeError(f"program: nan_policy is {nan_policy!r}; expected one of {policies}. Choose one of these.")
        if 0 in call.q.shape[:3]:
            return call.v.to(call.q.dtype), call.state
        if not forms[form].corrections:
            outer = torch.is_grad_enabled()  # leaving inference mode would switch it on
            with (
                torch.autocast(call.q.device.type, enabled=False), torch.inference_mode(False),
                torch.set_grad_enabled(outer),
            ):  # fmt: skip
                o, after = primal(self, Twin(self.learner), call.plain())
        else:
            o, after = self._scan(form, backend, call, remat, overwrite and nan_policy != "raise", params)
        if nan_policy == "raise" and all(map(is_known, after.tensors().values())):

            def after_tokens(n: int) -> State:
                with torch.no_grad():
                    return self._run(call.part(slice(None), n), form, backend, None, "propagate", False)[1]

            check_finite(after, after_tokens, call.q.shape[1], self.chunk)
        return o.to(call.q.dtype), after

    def losses(
        self, k: Tensor, v: Tensor, gates: Mapping[str, Tensor] | None = None, *, state: State | None = None,
        mask: Tensor | None = None, reset: Tensor | None = None, params: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, State]:  # fmt: skip
        """Return each token's inner loss before and after its own update, and the state.

        before_t = loss(f(k_t; anchor), v_t): the one whose gradient is taken;  after_t = loss(f(k_t; theta_t), v_t)
        Shape:  k, v, gates, mask, reset as for a call -> before, after (B, T, H), 0 for padding.
        Dtype:  float32, or float64 if one of k, v and the fast weights is.
        Raises: ShapeError.
        """
        self.refresh()
        call = self.signature.call(k, k, v, gates, state, mask, reset, params)
        if 0 in call.k.shape[:3]:
            none = call.v.new_zeros(call.v.shape[:3], dtype=call.dtype)
            return none, none, call.state
        both, after = self._scan("losses", "auto", call, "auto", params=params)
        return both[..., 0], both[..., 1], after

    def _scan(
        self, form: str, backend: str, call: Call, remat: str | int | None, overwrite: bool = False,
        params: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, State]:  # fmt: skip
        if not compiles():
            call = call.owned() if torch.is_grad_enabled() else call
            made = self.plan(call.q.shape[-1], call.dtype, form)  # outside the op, where whatever fails says why
            expect_width(call.v, made.derivation.V)
            fixed = {name: self.parts.buffers[name] for name in self.door.fixed}
            if fixed:
                expect_fixed(fixed, self._compared, call.slow, params or {})
        o, *held, position = scan(self.name, form, backend, call, self.chunk, remat, overwrite)
        return o, call.after(held, position)

    def initial_state(self, batch: int, heads: int, params: Mapping[str, Tensor] | None = None) -> State:
        """Return the state that a sequence starts from: every row at the initial weights, registers at their start."""
        for name, x in (("batch", batch), ("heads", heads)):
            advice = "Pass how many there are."
            require(is_whole(x, 0), "program.initial_state", name, x, "a whole number >= 0", advice)
        signature, given = self.signature, params or {}
        fast, _ = signature.with_heads(given, heads, signature.computed_in(given), signature.kind[1])
        return started(fast, self.rule.start, batch)

    @property
    def _shown(self) -> Plan:
        """The plan that is printed: at the inferred width, in the learner's dtype."""
        if self.width is None:
            raise DerivationError(
                "derive: the learner's input width K cannot be told from its parameters; expected an attribute `dim` "
                "or a call. Set learner.dim = K, or call the program once."
            )
        return self.plan(self.width, self.signature.kind[0], "auto")

    @property
    def derivation(self) -> Derivation:
        """The derivation that is printed."""
        return self._shown.derivation

    @property
    def step(self) -> TracedStep:
        # Of the plan, which traces out of sight: torch 2.11's export prints each module while it traces.
        return self._shown.step(Variant(self.chunk, fresh=True, dense=True, opens=False))

    def schedule(self, backend: Any = "cpp") -> Mapping[str, Code]:
        """Say what a backend that generates code makes of one whole mini-batch: a part per direction, with its source.

        Raises: DerivationError for a backend that runs the graphs as they are.
        """
        whole = backend_of(backends_key(backend, "program.schedule")).whole
        if whole is None:
            raise DerivationError(
                f"program.schedule: backend is {backend!r}; expected one that generates code, as 'cpp'. Print the "
                "program instead."
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
        """Each form by name: None if it applies, or the learner's line and why it does not;
        `form="auto"` takes what is cheapest."""
        return self.derivation.forms()

    @property
    def sites(self) -> list[Choice]:
        """Where the weights meet the data, with the form that each took and what the others cost."""
        return self.step.choices

    def explain(self, level: str = "steps") -> Account:
        """Explain the derivation: level "one-line", "steps" (sites, derivatives, forms,
        costs) or "proof" (and the code)."""
        words = chosen_in_words(self.plan(self.derivation.K, self.derivation.dtype, "auto"))
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


# Programs by learner, and traced steps by structure.
_programs: Bounded[ChunkProgram] = Bounded(256)
_structures: Bounded[Plan] = Bounded(256)
_proved: Bounded[Proof] = Bounded(1024)


def derive(
    learner: nn.Module, objective: Any = "squared", rule: Any = "sgd", *, chunk: int = 16, slow: tuple[str, ...] = (),
    block: int | None = None, prove: bool = True,
) -> ChunkProgram:  # fmt: skip
    """Derive a chunk program from an inner model: its gradients, its dual form where one exists, its state.

    th <- mini-batch of `chunk` tokens <- gradients at th; outputs with each token's own weights
    Shape:  learner maps rows (..., K) -> (..., V), K != V allowed; its parameters are fast unless `slow` (fnmatch) or
            the module's own attribute `slow` names them. block: at most so many tokens are computed at once (any value
            gives the same results). prove: the first time a structure is seen, compare the derived form with the
            definition in outputs, state and outer gradients (`program.proof`; about a second, remembered on disk);
            DUALFORM_PROVE=0 switches it off.
    Dtype:  see ChunkProgram.
    Raises: DerivationError if tokens mix, randomness is active or buffers are written, naming the learner's line,
            and where the proof finds a difference.
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
            f"derive: learner is a {type(learner).__name__}; expected a built nn.Module. Call the recipe with a width: "
            "spec(dim)."
        )
    for name, x in (("chunk", chunk), ("block", block)):
        expected = "a number of tokens, a whole number >= 1"
        is_right = is_whole(x) or (name == "block" and x is None)
        require(is_right, "derive", name, x, expected, "Pass a positive int.", DerivationError)
    require(isinstance(prove, bool), "derive", "prove", prove, "True or False", "Pass one of them.", DerivationError)
    slow = patterns("slow", slow)
    loss = _resolved("objective", objectives, objective, Callable, "f(prediction, target) -> (...,), a loss per token")
    expect_two_arguments(loss)
    built = _resolved("rule", rules, rule, Rule, "a df.Rule(step=...)")
    frozen = tuple(name for name, p in learner.named_parameters() if not p.requires_grad)
    with TRACING:
        reading = Fingerprint(learner, loss, built).key or object()
        key = (id(learner), id(loss), id(built), reading, chunk, slow, block, prove, frozen)
        if key not in _programs:
            _programs[key] = ChunkProgram(learner, loss, built, chunk, slow, block, prove)
        return _programs[key]


def _resolved(name: str, catalogue: Catalogue, spec: Any, kind: Any, expected: str) -> Any:
    """Return what a spec builds, the same object for equal specs; pass on what is built already."""
    if isinstance(spec, Bound | Record) or not (isinstance(spec, kind) or callable(spec)):
        return _built(catalogue.build(spec))
    is_right, advice = isinstance(spec, kind) and not isinstance(spec, type), "Pass what a class or a function makes."
    require(is_right, "derive", name, spec, f"{expected}, or a spec", advice, DerivationError)
    return spec


@lru_cache(maxsize=256)
def _built(bound: Bound) -> Any:
    return bound.build()
