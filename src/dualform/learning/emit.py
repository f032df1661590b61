"""One mini-batch, for one head: key pass, query pass and state update, from the sites of a learner.

    y_t = y0(xq_t) + J(xq_t)[c_t th + d_t . R_0] - sum_{s<=t} C[t,s] J(xq_t) sum_sites J(x_s)^T delta_s
    R_n = (A_n ... A_1) R_0 - sum_s (A_n ... A_{s+1} b_s) sum_sites J(x_s)^T delta_s

Each sum is a contraction of C, J at the query, J at the keys and delta; its order is the form. Tokens first: weights
per token. Query with key first: scores. Nothing here is traced or knows a learner; `derive` traces it.

Legend: W tokens, t query token, s key token, th anchor, R registers, g gradient, delta d loss / d y.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from dualform.algebra.index_text import IndexFormula
from dualform.algebra.linear_map import Derivative, compose
from dualform.algebra.notation import formula
from dualform.graphs import local_rules as table
from dualform.graphs.local_derivatives import identity
from dualform.graphs.recorder import recorded_so_far
from dualform.graphs.requiring import node_of
from dualform.graphs.trace import source_line
from dualform.learning.forms import Meeting, forms
from dualform.learning.front_door import Routine, TracedRule
from dualform.learning.grid import Variant
from dualform.learning.rules import Coefficients, Rule, Scalar, is_number, mixed, unroll
from dualform.learning.sites import Analysis, Site, maker, op_name, operand_nodes, read_nodes
from dualform.learning.spelling import DerivationError, twins
from dualform.learning.token_maps import Price, Written, separated, together, token_back, token_first, weighted


@dataclass
class Choice:
    """How one site's correction is computed, and what the other way would have cost."""

    site: str  # the op
    line: str  # the learner's line
    leaf: str
    form: str  # the correction's name
    prices: dict[str, Price]  # of every correction
    derivative: IndexFormula  # d y / d leaf
    kernels: tuple[IndexFormula, ...]  # y -= sum over the source axes of kernel * delta, for each site of the leaf
    why: str = ""  # why the leaf is materialised per token

    @property
    def op_text(self) -> str:
        return f"`{self.line}`" if self.line else self.site

    def __str__(self) -> str:
        return f"{self.leaf} in {self.op_text}: {self.form}"


class Inner(NamedTuple):
    """Everything about a layer's inner problem that does not depend on sizes."""

    rule: Rule
    target: str
    form: str
    observed: bool = False  # give each token's inner loss, before and after its own update, in place of the output


class StepInputs(NamedTuple):
    """One block for one head. R is None when every register is at its start; i, valid, full as `Grid` says."""

    th: dict[str, Tensor]
    R: dict[str, Tensor] | None
    q: Tensor
    k: Tensor
    v: Tensor
    gates: dict[str, Tensor]
    slow: dict[str, Tensor]
    i: Tensor | None = None
    valid: Tensor | None = None
    full: Tensor | None = None
    opens: Tensor | None = None
    init: dict[str, Tensor] | None = None


@dataclass
class _Keys:
    """What the key pass leaves behind: values, and per leaf the sites' derivatives with their deltas."""

    env: dict[fx.Node, Any]
    derivatives: dict[str, list[Written]]
    par: dict[tuple[fx.Node, str], Derivative] = field(default_factory=dict)


def called(x: Any, name: str) -> Any:
    """While tracing, name a value's node, for who reads the printed program; several results keep theirs."""
    node = node_of(x) if isinstance(x, Tensor) else None
    if node is not None and node.op == "call_function":
        node._rename(name)
    return x


class Emitter:
    """Run one block of a learner whose trace is `many` (W tokens) and, for leaf sites, `one` (a single token)."""

    def __init__(
        self, inner: Inner, many: Analysis, one: Analysis | None, loss: Routine, rule: Routine, variant: Variant,
        chunk: int,
    ) -> None:  # fmt: skip
        self.inner, self.many, self.variant, self.chunk = inner, many, variant, chunk
        self.loss, self.rule = loss, rule
        self.sites = {site.node: site for site in many.sites}
        self.cut = sorted({leaf for site in many.sites if not site.admissible for leaf in site.leaves})
        self.twin = twins(many.graph.graph, one.graph.graph, variant.width) if one else {}
        self.one = one
        self.choices: list[Choice] = []
        self.section = ""

    def begin(self, section: str) -> None:
        """While tracing, file what was recorded so far under its heading and start another."""
        for node in recorded_so_far():
            node.meta.setdefault("section", self.section)
        self.section = section

    def __call__(self, x: StepInputs) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor] | None]:
        """Return (o, th', R'); R' is None when every register is certain to start anew."""
        W, rule = self.variant.width, self.inner.rule
        self.begin("the rule's coefficients: theta_t = c_t th + d_t R_0 - sum_{s<=t} C[t,s] g_s")
        x = self._opened(x)
        i = torch.arange(1, W + 1, dtype=x.q.dtype, device=x.q.device) if x.i is None else x.i
        last = None if self.variant.completes(self.chunk) else (i == self.chunk).to(i.dtype)
        traced = TracedRule(rule.num_registers, self.rule, x.slow)
        coef = unroll(traced, i, x.gates, x.valid, last if last is None or x.valid is None else last * x.valid)
        called(coef.C, "C")
        self.begin("key pass: the learner at the anchor")
        keys = self._key_pass(x)
        self.begin("query pass: the learner with each token's own weights, corrected at every site")
        if self.inner.observed:
            before = self._losses(keys.env[self.many.output], x)
            learnt = self._query_pass(x._replace(q=x.k), coef, keys)
            o = torch.stack([before, self._losses(learnt, x)], -1)
        else:
            o = self._query_pass(x, coef, keys)
        self.begin("state: the weights that the next mini-batch starts from")
        after = self._advance(x, coef, keys)
        self.begin("")
        return o, *after

    def _opened(self, x: StepInputs) -> StepInputs:
        if x.opens is None or x.init is None:
            return x
        opens = x.opens
        th = {leaf: torch.where(opens, x.init[leaf], w) for leaf, w in x.th.items()}
        R = x.R and {leaf: torch.where(opens, self._start(x.init[leaf]), r) for leaf, r in x.R.items()}
        return x._replace(th=th, R=R)

    def _start(self, th: Tensor) -> Tensor:
        return torch.stack([s * th for s in self.inner.rule.start])

    def _losses(self, prediction: Tensor, x: StepInputs) -> Tensor:
        """Return the inner loss of each token."""
        (loss,) = self.loss((prediction, x.v - x.k if self.inner.target == "v-k" else x.v), x.slow)
        return loss

    def _key_pass(self, x: StepInputs) -> _Keys:
        a, W = self.many, self.variant.width
        with torch.enable_grad():
            th = {leaf: w.detach().requires_grad_() for leaf, w in x.th.items()}
            env = self._inputs(x, th)
            env[a.x] = x.k.detach().requires_grad_()
            copies = {leaf: th[leaf].expand(W, *th[leaf].shape) for leaf in self.cut}
            for node in a.nodes:
                site = self.sites.get(node)
                if site is None or site.admissible:
                    env[node] = called(a.value(node, env), f"{node.name}_k" if node in a.tok else node.name)
                else:
                    env[node] = called(self._per_token(site, copies, env), f"{node.name}_k")
            loss = self._losses(env[a.output], x).sum()
            proper = [site for site in a.sites if site.admissible]
            ends = [env[site.node] for site in proper] + list(copies.values())
            self.begin(
                "gradients of the inner loss with respect to the site outputs: no gradient of a weight is formed"
            )
            deltas: tuple[Tensor, ...] = ()  # a learner may use none of its fast weights
            if ends:
                deltas = torch.autograd.grad(loss, ends, create_graph=True, allow_unused=True, materialize_grads=True)
        for site, delta in zip(proper, deltas, strict=False):
            called(delta, f"delta_{site.node.name}")
        env = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, env)
        keys = _Keys(env, {leaf: [] for leaf in x.th})
        for site, delta in zip(proper, deltas, strict=False):
            for leaf, (J, axis) in self._site_derivatives(site, env, keys, "k").items():
                keys.derivatives[leaf].append((J, axis, delta.detach().reshape(J.out_shape)))
        for leaf, delta in zip(self.cut, deltas[len(proper) :], strict=True):
            keys.derivatives[leaf].append((self._copied(x.th[leaf]), 0, delta.detach()))
        keys.derivatives = {leaf: together(written) for leaf, written in keys.derivatives.items()}
        return keys

    def _inputs(self, x: StepInputs, th: Mapping[str, Tensor]) -> dict[fx.Node, Any]:
        a = self.many
        return {a.leaf_nodes[n]: w for n, w in th.items()} | {node: x.slow[n] for n, node in a.slow_nodes.items()}

    def _copied(self, w: Tensor) -> Derivative:
        """Derivative of W copies of a leaf: a delta on its own axes, a broadcast along the tokens."""
        J = identity(w)
        (term,) = J.terms
        (token,) = identity(w.new_empty(self.variant.width)).terms
        return Derivative(
            (replace(term, out=token.out + term.out),), (self.variant.width, *w.shape), J.in_shape, J.dtype, J.device
        )

    def _site_derivatives(
        self, site: Site, env: Mapping[fx.Node, Any], keys: _Keys, row: str
    ) -> dict[str, tuple[Derivative, int | None]]:
        """Give d y / d leaf for every leaf behind a site, with the token axis of y by itself."""
        a, call, found = self.many, self.many.call(site.node, env, row), {}
        operands = call.operands
        nodes = operand_nodes(site.node)
        for j, node in enumerate(nodes):
            if node not in site.pars:
                continue
            assert len(operands) == len(nodes)
            local = table.derivative(call, j)
            for leaf in a.leaves[node]:
                J = compose(local, self._par_derivative(node, leaf, keys))
                found[leaf] = found[leaf] + J if leaf in found else J
        if self.variant.width == 1:
            return {leaf: (J, None) for leaf, J in found.items()}  # the one token has no label
        return {
            leaf: separated(J, a.places[site.node], self.variant.width, env[site.node]) for leaf, J in found.items()
        }

    def _par_derivative(self, node: fx.Node, leaf: str, keys: _Keys) -> Derivative:
        """Differentiate a par node with respect to a leaf; constant, since the par subgraph is affine."""
        if (node, leaf) not in keys.par:
            if node is self.many.leaf_nodes[leaf]:
                J = identity(keys.env[node])
            else:
                call, J = self.many.call(node, keys.env), None
                for j, source in enumerate(operand_nodes(node)):
                    if leaf in self.many.leaves[source]:
                        part = compose(table.derivative(call, j), self._par_derivative(source, leaf, keys))
                        J = part if J is None else J + part
                assert J is not None
            keys.par[node, leaf] = J
        return keys.par[node, leaf]

    def _query_pass(self, x: StepInputs, coef: Coefficients, keys: _Keys) -> Tensor:
        a = self.many
        env = {node: value for node, value in keys.env.items() if node not in a.tok}
        env[a.x] = x.q
        copies = {}
        for leaf in self.cut:
            J = self._copied(x.th[leaf])
            base = x.th[leaf].expand(self.variant.width, *x.th[leaf].shape)
            copies[leaf] = self._corrected(None, leaf, base, J, 0, x, coef, keys)
        for node in a.nodes:
            if node not in a.tok:
                continue
            site = self.sites.get(node)
            if site is None:
                env[node] = called(a.value(node, env), f"{node.name}_q")
            elif site.admissible:
                env[node] = y = a.value(node, env)
                for leaf, (J, axis) in self._site_derivatives(site, env, keys, "q").items():
                    apart = y if y.shape == J.out_shape else y.reshape(J.out_shape)
                    corrected = self._corrected(node, leaf, apart, J, axis, x, coef, keys)
                    y = corrected if apart is y else corrected.reshape(y.shape)
                env[node] = called(y, f"{node.name}_q")
            else:
                env[node] = called(self._per_token(site, copies, env), f"{node.name}_q")
        return env[a.output]

    def _corrected(
        self, node: fx.Node | None, leaf: str, y: Tensor, J: Derivative, axis: int | None, x: StepInputs,
        coef: Coefficients, keys: _Keys,
    ) -> Tensor:  # fmt: skip
        """Add J[(c_t - 1) th + d_t . R_0] to y at the anchor, and take off the gradients read so far."""
        for weight, tensor in self._starting_point(leaf, x, coef):
            y = y + (J.jvp(tensor) if is_number(weight, 1.0) else weighted(J, axis, weight).jvp(tensor))
        met = Meeting(J, axis, keys.derivatives[leaf], coef, x.th[leaf].shape, self.variant.width, y)
        correction, prices = forms[self.inner.form].choose(met)
        at = node or next(site.node for site in self.many.sites if not site.admissible and leaf in site.leaves)
        why = "" if node else self.sites[at].why
        derivative = formula(J.terms, J.out_shape, J.in_shape, f"dy/d{leaf}")
        kernels = tuple(formula(K.terms, K.out_shape, K.in_shape, "K") for K, _ in met.kernels)
        name, line = op_name(at), source_line(at)
        self.choices.append(Choice(name, line, leaf, correction.name, prices, derivative, kernels, why))
        return correction.value(met)

    def _starting_point(self, leaf: str, x: StepInputs, coef: Coefficients) -> list[tuple[Scalar, Tensor]]:
        """List (weight, tensor) whose J is to be added to the value at the anchor, zeros left out."""
        c: Scalar = coef.c - 1.0
        parts: list[tuple[Scalar, Tensor]] = []
        for k, d in enumerate(coef.d):
            if x.R is not None:
                parts.append((d, x.R[leaf][k]))
            elif self.inner.rule.start[k] != 0.0:
                c = c + d * self.inner.rule.start[k]
        return [(w, t) for w, t in [(c, x.th[leaf]), *parts] if not is_number(w, 0.0)]

    def _per_token(self, site: Site, copies: Mapping[str, Tensor], env: Mapping[fx.Node, Any]) -> Any:
        """Run an inadmissible site with each token's own weights: the traced op at one token, mapped over tokens."""
        assert self.one is not None
        a, one, W = self.many, self.one, self.variant.width
        toks = [n for n in site.node.all_input_nodes if n in a.tok]
        if any(n not in self.twin for n in (site.node, *toks)):
            raise DerivationError(
                f"derive: {op_name(site.node)} at {source_line(site.node)} is computed by other ops for one token than "
                f"for {W}; expected the same, to run it token by token. Write that line with other ops."
            )

        def run(weights: dict[str, Tensor], tokens: list[Tensor]) -> Tensor:
            local: dict[fx.Node, Any] = {one.leaf_nodes[n]: w for n, w in weights.items()}
            local |= {one.slow_nodes[n]: env[a.slow_nodes[n]] for n in one.slow_nodes}
            local |= {
                self.twin[n]: x.reshape(self.twin[n].meta["val"].shape) for n, x in zip(toks, tokens, strict=True)
            }
            return _evaluate(one, self.twin[site.node], local, env[a.x])

        weights = {leaf: copies[leaf] for leaf in site.leaves}
        if W == 1:
            return run({leaf: w[0] for leaf, w in weights.items()}, [env[n] for n in toks])
        made = torch.vmap(run)(weights, [token_first(env[n], a.places[n], W) for n in toks])
        if isinstance(made, Tensor):
            return token_back(made, a.places[site.node], site.node.meta["val"].shape)
        read = {part: n for n in site.node.users if (part := maker(n)[1]) is not None}
        return tuple(
            token_back(x, a.places[read[k]], read[k].meta["val"].shape) if k in read else x for k, x in enumerate(made)
        )

    def _advance(
        self, x: StepInputs, coef: Coefficients, keys: _Keys
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        rule, certain = self.inner.rule, self.variant.completes(self.chunk)
        after: dict[str, Tensor] = {}
        registers: dict[str, Tensor] = {}
        a, u = coef.end
        if certain and all(rule.resets):  # no register outlives the mini-batch: the weights alone
            total = mixed(u, coef.write)
            for leaf, th in x.th.items():
                R0 = self._first(x, leaf)
                terms = [(a, th), *((mixed(u, [row[l] for row in coef.carry]), R0[l]) for l in range(len(R0)))]
                value = self._written(_combined(terms), leaf, total, keys)
                after[leaf] = torch.zeros_like(th) if value is None else value
            return after, None

        def ended(new: Tensor, old: Tensor) -> Tensor:
            """Take the new value where a row's mini-batch ends with this block."""
            if certain:
                return new
            assert x.full is not None
            return torch.where(x.full, new, old)

        for leaf, th in x.th.items():
            R0, R = self._first(x, leaf), []
            for k, row in enumerate(coef.carry):
                value = self._written(_combined(zip(row, R0, strict=True)), leaf, coef.write[k], keys)
                R.append(torch.zeros_like(th) if value is None else value)
            end = _combined([(a, th), *zip(u, R, strict=True)])
            assert end is not None
            after[leaf] = ended(end, th)
            kinds = zip(rule.start, rule.resets, R, strict=True)
            registers[leaf] = torch.stack([ended(s * end, r) if new else r for s, new, r in kinds])
        return after, registers

    def _first(self, x: StepInputs, leaf: str) -> list[Tensor | None]:
        """Return a leaf's registers before the block; None: zero."""
        return list(x.R[leaf]) if x.R is not None else [s * x.th[leaf] if s else None for s in self.inner.rule.start]

    def _written(self, value: Tensor | None, leaf: str, weights: Scalar, keys: _Keys) -> Tensor | None:
        """Take weights_s g_s off a value, summed over the block."""
        for K, axis, delta in keys.derivatives[leaf]:
            written = weighted(K, axis, weights).T.jvp(delta)
            value = -written if value is None else value - written
        return value


def _combined(terms: Iterable[tuple[Scalar, Tensor | None]]) -> Tensor | None:
    """Sum weight * tensor, what is certainly zero left out; None if all is."""
    parts = [x if is_number(w, 1.0) else w * x for w, x in terms if x is not None and not is_number(w, 0.0)]
    return sum(parts[1:], parts[0]) if parts else None


def _evaluate(a: Analysis, goal: fx.Node, env: dict[fx.Node, Any], like: Tensor) -> Any:
    """Run what `goal` needs on top of `env`; zeros_like(x) needs no x, but its shape."""
    if goal not in env:
        read = read_nodes(goal)
        for source in read:
            _evaluate(a, source, env, like)
        values = {n: n.meta["val"] for n in goal.all_input_nodes if n not in read and n not in env}
        shapes = {n: like.new_zeros(x.shape, dtype=x.dtype) for n, x in values.items()}
        env[goal] = a.value(goal, env | shapes)
    return env[goal]
