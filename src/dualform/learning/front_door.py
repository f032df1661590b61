"""The front door: how a user's learner, objective and rule come in.

All three are read by one fingerprint, traced by the one tracer (on a twin, so that the user's module is never touched),
and proved to keep tokens apart. Tensors that they close over become inputs under a name: live, and reached by outer
gradients. Nothing else in this folder calls them but `primal`, the definition.

Legend: W tokens in a trace, K key width, V value width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from dualform.graphs.counts import Asked
from dualform.graphs.edit import add_input, emitter, inputs_of, lift, output_of
from dualform.graphs.fingerprint import Fingerprint
from dualform.graphs.told_apart import expect_as_on_tensors
from dualform.graphs.trace import source_line, trace
from dualform.graphs.twin import Twin, typed
from dualform.learning.alike import Seen, decided, difference, own_tables, seen
from dualform.learning.objectives import expect_target
from dualform.learning.roles import split_parameters
from dualform.learning.rules import Rule, Step
from dualform.learning.sites import PER_TOKEN, Analysis, changes, counts, felt, is_apart, kept_apart, mark, prepared
from dualform.learning.spelling import DerivationError
from dualform.learning.transforms import stand_ins
from dualform.shapes import TraceError
from dualform.storages import contents, like, thin

aten = torch.ops.aten


@dataclass(eq=False)
class Routine:
    """A traced function of tokens: an objective's loss, a rule's coefficients.
    Numbers among its results stay numbers."""

    analysis: Analysis
    results: list[Any]  # nodes and numbers

    def __call__(self, tokens: Iterable[Tensor], rest: Mapping[str, Tensor]) -> list[Any]:
        """Run it op by op on (W, ...) tokens; rest: the tensors that it closes over, by name."""
        a = self.analysis
        env: dict[fx.Node, Any] = dict(zip(a.tokens, tokens, strict=True))
        env |= {node: rest[name] for name, node in a.slow_nodes.items()}
        for node in a.nodes:
            env[node] = a.value(node, env)
        return [env[x] if isinstance(x, fx.Node) else x for x in self.results]

    @property
    def text(self) -> str:
        """What decides it, its numbers included."""
        return f"{self.analysis.graph.code} {[x.name if isinstance(x, fx.Node) else x for x in self.results]}"


class FrontDoor:
    """A learner, an objective and a rule as they are now: read, sorted, traced on demand.

    `is_current` asks whether anything that a trace bakes in has changed; `read` reads anew.
    """

    def __init__(self, learner: nn.Module, objective: Callable[..., Any], rule: Rule, slow: tuple[str, ...]) -> None:
        for name, p in learner.named_parameters():
            if isinstance(p, nn.parameter.UninitializedParameter):
                raise DerivationError(
                    f"derive: the learner's {name!r} has no shape yet; expected built parameters. Run it once: "
                    "learner(torch.zeros(1, K))."
                )
        for name, part in learner.named_modules():
            if isinstance(getattr(part, "door", None), FrontDoor):
                whose = f"the learner's {name!r}" if name else "the learner"
                raise DerivationError(
                    f"derive: {whose} is a program, which learns over a sequence; expected a function of one token. "
                    "Run it before or after this one, on its outputs."
                )
        self.learner, self.objective, self.rule, self.slow = learner, objective, rule, slow
        self.frozen = frozenset(n for n, p in learner.named_parameters() if not p.requires_grad)
        self.key: Any = None
        self._unread = ""  # what cannot be read, once it was said
        # Tensors that a trace read by value, with what lay there and where the fingerprint has them;
        # closed-over ones by name, where it has them, or themselves.
        self._versions: dict[int, tuple[Tensor, bytes | int, int | None]] = {}
        self._found: dict[str, int | Tensor] = {}
        self._first: dict[Any, Seen] = {}  # traces that all others are held against
        self._traced: dict[Any, fx.GraphModule] = {}  # and were held, not asked for yet
        self._settled: set[Any] = set()  # whose they are that were traced wherever they decide by the number of tokens
        self.asks = False  # does any of the three read how many tokens there are?
        self._later: list[Callable[[], None]] = []  # comparisons of traces, once all else is right
        self.read()

    @property
    def target(self) -> str:
        """What the objective compares with: v, unless it says otherwise in a word."""
        found = getattr(self.objective, "target", "v")
        if not isinstance(found, str):
            return "v"
        return expect_target("derive", "the objective's target", found, DerivationError)

    def read(self) -> bool:
        """Read everything anew; return whether a trace made before still stands."""
        reading = Fingerprint(self.learner, self.objective, self.rule, watch=True)
        there = dict(enumerate(reading.tensors))
        same = all(at is None or there.get(at) is x for x, _, at in self._versions.values())
        stands = same and self._unwritten() and reading.key is not None and reading.key == self.key
        self.reading, self.key = reading, reading.key
        if reading.unreadable not in ("", self._unread):
            self._unread = reading.unreadable
            warnings.warn(
                f"derive: learner, objective or rule hold {reading.unreadable}, whose state cannot be read; they are "
                "traced again at each call, as it may have changed. Keep numbers, lists or tensors in its place, or "
                "give it a __fingerprint__().",
                stacklevel=2,
            )
        parts = split_parameters(self.learner, self.slow, self.frozen)
        if not stands:
            self._found, self._versions, self._first, self._traced = {}, {}, {}, {}
            self._settled, self.asks = set(), False
        closed = {n: reading.tensors[x] if isinstance(x, int) else x for n, x in self._found.items()}
        self.parts = parts._replace(closed=closed)
        self._own = {id(x): name for name, x in (*parts.fast.items(), *parts.slow.items(), *parts.buffers.items())}
        self._slot = {id(x): n for n, x in enumerate(reading.tensors)}
        self._within, self._instead = stand_ins(reading.tensors, self.objective)
        # Shapes are read on the CPU, or where what is closed over lies: an op takes tensors of one device.
        places = [x.device for x in reading.tensors if id(x) not in self._own and x.device.type != "cpu"]
        self.device = min(places, key=lambda place: place.type == "meta", default=torch.device("cpu"))
        return stands

    def is_current(self) -> bool:
        """Is everything as it was read?"""
        return self.reading.holds() and self._unwritten()

    def _unwritten(self) -> bool:
        return all(contents(x) == was for x, was, _ in self._versions.values())

    @property
    def fixed(self) -> list[str]:
        """Buffers whose values a trace has read: numbers, masks and sizes that the graph was made for."""
        return [self._own[x] for x in self._versions if x in self._own]

    def trace_learner(self, W: int, K: int, dtype: torch.dtype) -> Analysis:
        """Trace and mark the learner on W tokens (W, K)."""
        fast = {n: like(p, dtype, self.device) for n, p in self.parts.fast.items()}
        rest = {n: like(p, dtype, self.device) for n, p in {**self.parts.slow, **self.parts.buffers}.items()}
        names, twin = [*fast, *rest], Twin(self.learner)
        parts = [x for own in self.parts[:3] for x in own.values()]

        def run(*tensors: Tensor) -> Any:
            return twin(dict(zip(names, tensors[:-1], strict=True)), tensors[-1])

        tables = {k: self.parts.buffers[n] for k, n in enumerate(names) if n in self.parts.buffers}

        def make(W: int, **eyes: Any) -> fx.GraphModule:
            tokens = torch.empty(W, K, dtype=dtype, device=self.device)
            return self._trace(run, [*fast.values(), *rest.values(), tokens], parts, known=tables, **eyes)

        gm, wrong = self._alike("learner", W, make, (K, dtype))
        inputs, result = _ends(gm)
        if not isinstance(result, fx.Node):
            raise DerivationError(
                f"derive: the learner returns {type(result).__name__}; expected one tensor (..., V). Return the "
                "prediction alone."
            )
        a = self._analysis("learner", W, gm, inputs[-1:], dict(zip(names, inputs, strict=False)), set(fast))
        if a.output not in a.tok:
            raise DerivationError(
                "derive: the learner's output does not depend on its input; expected f(x), a prediction per token. "
                "Use x in forward."
            )
        if W > 1 and not is_apart(a, a.output):
            raise DerivationError(
                f"derive: the learner's output has its tokens at axis {a.places[a.output].axis}; expected axis 0, as "
                "in its input: (..., K) -> (..., V). Transpose back before returning."
            )
        self._expect(wrong)
        return a

    def trace_objective(self, W: int, V: int, *dtypes: torch.dtype) -> Routine:
        """Trace the objective on predictions and targets (W, V) of two dtypes;
        prove that each token has a loss of its own."""

        def make(W: int, **eyes: Any) -> fx.GraphModule:
            tokens = [torch.empty(W, V, dtype=dtype, device=self.device) for dtype in dtypes]
            return self._trace(lambda p, v: typed(self.objective, v.dtype, self._instead)(p, v), tokens, **eyes)

        gm, wrong = self._alike("objective", W, make, (V, *dtypes))
        inputs, result = _ends(gm)
        value = result.meta["val"] if isinstance(result, fx.Node) else None
        if not isinstance(value, Tensor):
            raise DerivationError(
                f"derive: the objective returns {type(result).__name__}; expected one tensor (...,), a loss per token. "
                f"{PER_TOKEN}"
            )
        if W > 1 and tuple(value.shape) != (W,):
            raise DerivationError(
                f"derive: the objective gives shape {tuple(value.shape)} for predictions and targets (W, V) = "
                f"{(W, V)}; expected one loss per token, (W,) = {(W,)}. {PER_TOKEN}"
            )
        if not value.is_floating_point():
            raise DerivationError(
                f"derive: the objective gives {value.dtype}; expected a floating loss that has a gradient. {PER_TOKEN}"
            )
        a = self._analysis("objective", W, gm, inputs, {}, set())
        if W > 1 and not is_apart(a, a.output):
            raise DerivationError(
                f"derive: the objective's losses are not made of their own tokens alone; expected axis 0. {PER_TOKEN}"
            )
        if a.output not in felt(a):
            raise DerivationError(
                "derive: the objective's loss has no gradient by the prediction, its first argument; expected "
                "f(prediction, target) -> (...,), a loss per token. Use it by more than comparisons."
            )
        self._expect(wrong)
        return Routine(a, [a.output])

    def trace_rule(self, W: int, dtype: torch.dtype) -> Routine:
        """Trace the rule's step on positions and gates (W,) each; prove that a token's coefficients are its own."""
        names, spec, leaves = self.rule.gates, None, []

        def run(i: Tensor, *gates: Tensor) -> list[Tensor]:
            nonlocal spec, leaves
            found, spec = _pytree.tree_flatten(self.rule.step(i, **dict(zip(names, gates, strict=True))))
            leaves = [Tensor if isinstance(x, Tensor) else x for x in found]
            return [x for x in found if isinstance(x, Tensor)]

        def make(W: int, **eyes: Any) -> fx.GraphModule:
            gates = [torch.empty(W, dtype=dtype, device=self.device) for _ in ("i", *names)]
            return self._trace(run, gates, **eyes)

        gm, wrong = self._alike("rule", W, make, (dtype,), lambda: [x for x in leaves if x is not Tensor])
        a = self._analysis("rule", W, gm, _ends(gm)[0], {}, set())
        _, found = _ends(gm)  # now: a tensor that is a coefficient as it is has become an input
        nodes = iter(found)
        results = [next(nodes) if x is Tensor else x for x in leaves]
        for node in found:
            shape = tuple(node.meta["val"].shape)
            if shape not in ((), (W,)) or (shape == (W,) and W > 1 and not is_apart(a, node)):
                raise DerivationError(
                    f"derive: the rule {self.rule.name!r} returns a coefficient of shape {shape} for {W} tokens; "
                    "expected a number, a tensor () or one entry per token, made of that token's position and gates. "
                    "Write it entry by entry."
                )
        self._expect(wrong)
        return Routine(a, [*results, spec])

    def _trace(
        self, f: Callable[..., Any], inputs: list[Tensor], parts: Sequence[Tensor] = (), **options: Any
    ) -> fx.GraphModule:
        """Trace; parts: the learner's own tensors, which the first inputs stand for."""
        self.reading.take_along()
        gm = trace(f, *inputs, generators=self.reading.generators, proved=kept_apart, **options)
        self._later.append(partial(expect_as_on_tensors, f, gm, inputs, parts, self.reading.telling))
        return gm

    def _expect(self, wrong: DerivationError | None) -> None:
        """Raise what was found before tokens were followed, which may say more; then what tells tensors apart."""
        later, self._later = self._later, []
        if wrong is not None:
            raise wrong
        for compare in later:
            compare()

    def _alike(
        self, who: str, W: int, make: Callable[..., fx.GraphModule], kind: Any, numbers: Callable[[], Any] = list
    ) -> tuple[fx.GraphModule, DerivationError | None]:  # fmt: skip
        """Trace, and say what is otherwise than in the kind's first trace: of another number of tokens, or call."""
        self._later = []
        key = (who, *kind)
        first, traced = self._first.get(key), self._traced.pop((key, W), None)
        if traced is not None and numbers is list:
            return traced, None

        def made(W: int) -> tuple[fx.GraphModule, Seen, str, Asked]:
            found, read = list[tuple[Seen, str]](), list[Tensor]()

            def look(gm: fx.GraphModule) -> None:
                now = seen(gm, W)
                found[:] = [(now, difference(first, now, read) if first else "")]

            gm = make(W, look=look, asked=(asked := Asked(W)))
            own_tables(gm, [x for x in read if id(x) not in self._own], W)
            now, wrong = found[0][0]._replace(results=numbers(), asked=asked), found[0][1]
            if first and first.results != now.results:
                wrong = wrong or f"its results: {first.results}, then {now.results}"
            self.asks |= asked.is_read
            return gm, now, wrong, asked

        gm, now, wrong, asked = made(W)
        if first is None:
            self._first[key] = first = now
        elif wrong:
            again, fork = made(first.W)[2], asked.fork(first.W) or first.asked.fork(W)
            return gm, changes(who, again) if again else counts(who, decided(fork, wrong, first.W, W))
        elif key not in self._settled:
            self._settled.add(key)
            return gm, self._otherwise(key, first.W, asked, made)
        return gm, None

    def _otherwise(
        self, key: Any, W: int, asked: Asked, made: Callable[[int], tuple[Any, Any, str, Asked]]
    ) -> DerivationError | None:
        """Trace at numbers of tokens for which a choice may go otherwise; say what is another function there."""
        counted = [n for n in range(1, max(asked.W, _MANY) + 1) if n not in (W, asked.W)]
        left = [n for n in counted if asked.fork(n) or asked.may_choose(n)]
        for _ in range(_FORKS):
            if not left:
                break
            n, fork = left[0], asked.fork(left[0])
            try:
                self._traced[key, n], _, wrong, there = made(n)
            except TraceError as error:
                if n > asked.W:  # so many may be too many for it
                    break
                why = str(error).partition("; expected")[0]
                where = (fork.where if fork else asked.where) or "its sizes"
                return counts(key[0], f"{where}: {asked.W} tokens run and {n} do not ({why})")
            if wrong:
                return counts(key[0], decided(fork, wrong, W, n))
            left = [m for m in left[1:] if there.fork(m) or asked.may_choose(m)]
        return None

    def _analysis(
        self, who: str, W: int, gm: fx.GraphModule, tokens: list[fx.Node], named: dict[str, fx.Node], fast: set[str]
    ) -> Analysis:
        constants, lifted = self._lifted(who, gm)
        a = prepared(
            gm,
            who=who,
            tokens=tuple(tokens),
            leaf_nodes={n: x for n, x in named.items() if n in fast},
            slow_nodes={n: x for n, x in named.items() if n not in fast} | lifted,
            constants=constants,
            held={lifted[n]: x for n, x in self.parts.closed.items() if n in lifted and not x.requires_grad},
        )
        mark(a, W)
        self._versions |= {id(x): (x, contents(x), self._slot.get(id(x))) for x in (*gm.meta["read"], *a.read)}
        return a

    def _lifted(self, who: str, gm: fx.GraphModule) -> tuple[dict[str, Tensor], dict[str, fx.Node]]:
        """Make inputs of the tensors that a trace has baked in: (those that it made itself, all of them by name)."""
        constants: dict[str, Tensor] = {}
        lifted: dict[str, fx.Node] = {}

        def stand_for(value: Tensor, node: fx.Node) -> fx.Node:
            own = self._own.get(id(value))
            if who == "learner" and own is not None:
                raise DerivationError(
                    f"derive: the learner reaches its own {own!r} at {source_line(next(iter(node.users)))} by another "
                    f"way than itself, so it would not learn there; expected self.{own}. Read it from the module that "
                    "is passed."
                )
            name = self._name(who, value, f"constant{len(constants)}{gm.meta.get('for', '')}")
            rows = {n: x for n, x in node.meta.items() if n == "rows"}
            made = value if name in self.parts.closed else thin(value)
            if name not in lifted:
                lifted[name] = add_input(gm.graph, f"closed{len(lifted)}", made.detach())
                lifted[name].meta |= rows if made is value else {}
                if name not in self.parts.closed:
                    constants[name] = made
            if made is value:
                return lifted[name]
            wide = emitter(gm.graph, node)(aten.expand.default, lifted[name], list(value.shape))
            return wide.meta.update(rows) or wide

        lift(gm, stand_for)
        return constants, lifted

    def _name(self, who: str, value: Tensor, own: str) -> str:
        """Name a closed-over tensor; one that existed before the trace is the front door's, live."""
        value = self._within.get(id(value), (value,))[0]
        known = {id(x): name for name, x in self.parts.closed.items()}
        if id(value) in known:
            return known[id(value)]
        slot = self._slot.get(id(value))
        taken = {*self._own.values(), *self.parts.closed}
        if slot is None and not value.requires_grad:
            return _free(f"{who}.{own}", taken)
        name = _free(f"{who}.{(self.reading.names[slot] if slot is not None else '') or 'closed'}", taken)
        self._found[name] = value if slot is None else slot
        self.parts.closed[name] = value
        return name


class TracedRule(NamedTuple):
    """A rule whose step runs as traced."""

    num_registers: int
    routine: Routine
    rest: Mapping[str, Tensor]

    def step(self, i: Tensor, **gates: Tensor) -> Step:
        """Return the record's coefficients at every token."""
        *leaves, spec = self.routine((i, *gates.values()), self.rest)
        return _pytree.tree_unflatten(leaves, spec)


def _ends(gm: fx.GraphModule) -> tuple[list[fx.Node], Any]:
    """A graph's inputs and its result."""
    return inputs_of(gm.graph), output_of(gm.graph).args[0]


def _free(name: str, taken: set[str]) -> str:
    return name if name not in taken else _free(name + "_", taken)


# Choices are looked for up to so many tokens, in so many traces at most; beyond these, the first call shows them.
_MANY, _FORKS = 16, 8
