"""Terms and paths that are missing or weighed otherwise, several at once: the weights that give what was got."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from dualform.calculus.op_slips import Slip, close, ratio_text, shown_term
from dualform.graphs.local_derivatives import Program
from dualform.graphs.trace import source_line

# Paths and terms of at most so many are weighed, in graphs of at most so many ops.
MAX_PATHS, MAX_OPS = 10, 40


def of_paths(got: Tensor, g: Tensor, program: Program) -> Slip | None:
    """Several terms of one op, or several paths, with factors of their own: those that give exactly what was got."""
    local = program.local
    if len(local) > MAX_OPS:
        return None
    for node, parts in local.items():
        terms = [(source, J, k) for source, J in parts for k in range(len(J.terms))]
        if not 2 <= len(terms) <= MAX_PATHS:
            continue
        shares = []
        for source, J, k in terms:
            only = [(s, L.with_terms([L.terms[k]] if s is source and L is J else [])) for s, L in parts]
            program.__dict__["local"] = {**local, node: only}
            shares.append(program.vjp(g))
        program.__dict__["local"] = {**local, node: [(s, L.with_terms([])) for s, L in parts]}
        rest = program.vjp(g)
        program.__dict__["local"] = local
        weights = _weights(got - rest, [share - rest for share in shares])
        if weights is not None and any(abs(w - 1) > 1e-6 for w in weights):
            name = program.name_of(node)
            said = [
                f"{ratio_text(w)} times the term {shown_term(J.terms[k])} of d{name}/d{program.name_of(source)}"
                for w, (source, J, k) in zip(weights, terms, strict=True) if abs(w - 1) > 1e-6
            ]  # fmt: skip
            return Slip(
                "term factor", f"has {', and '.join(said)}; expected each once. (at `{line_of(program, node)}`)"
            )
    paths = _paths_of(program)
    if not 2 <= len(paths) <= MAX_PATHS:
        return None
    shares = []
    for path in paths:
        pulled = g
        for source, node in reversed(path):
            pulled = next(J for s, J in local[node] if s is source).vjp(pulled)
        shares.append(pulled)
    weights = _weights(got, shares)
    if weights is None:
        return None
    wrong = [(w, path) for w, path in zip(weights, paths, strict=True) if abs(w - 1) > 1e-6]
    if not wrong:
        return None
    kind = "missing path" if all(abs(w) < 1e-6 for w, _ in wrong) else "path factor"
    said = [f"{ratio_text(w)} times the path {_way(program, path)}" for w, path in wrong]
    return Slip(kind, f"has {', and '.join(said)}; expected each path once.")


def _way(program: Program, path: Sequence[tuple[fx.Node, fx.Node]]) -> str:
    return " -> ".join([program.name_of(path[0][0]), *(program.name_of(node) for _, node in path)])


def _paths_of(program: Program) -> list[list[tuple[fx.Node, fx.Node]]]:
    """The paths from the input to the result, none if there are too many."""
    into: dict[fx.Node, list[list[tuple[fx.Node, fx.Node]]]] = {program.source: [[]]}
    for node, parts in program.local.items():
        sources = [source for source, _ in parts]
        if len(sources) > len(set(sources)):
            return []
        into[node] = [[*path, (source, node)] for source in sources for path in into.get(source, [])]
        if len(into[node]) > MAX_PATHS:
            return []
    return [path for path in into.get(program.output, []) if path]


def _weights(got: Tensor, shares: Sequence[Tensor]) -> list[float] | None:
    """The factors with which shares add up to what was got, if there is one way only."""
    most = max(share.abs().max().item() for share in shares)
    mattering = [k for k, share in enumerate(shares) if share.abs().max().item() > 1e-9 * most]
    if len(mattering) < len(shares):  # what is 0 here says nothing
        some = _weights(got, [shares[k] for k in mattering]) if len(mattering) > 1 else None
        found = dict(zip(mattering, some, strict=True)) if some else {}
        return [found.get(k, 1.0) for k in range(len(shares))] if some else None
    A = torch.stack([share.flatten() for share in shares], 1).to(torch.float64)
    if A.shape[0] < A.shape[1] + 1 or int(torch.linalg.matrix_rank(A)) < A.shape[1]:
        return None
    weights = torch.linalg.lstsq(A, got.flatten().to(torch.float64)[:, None]).solution[:, 0]
    # A factor that nobody would write is chance: so few numbers say little.
    plain = all(abs(w * n - round(w * n)) < 1e-6 for w in weights.tolist() for n in [_denominator(w)])
    return weights.tolist() if plain and close((A @ weights).reshape(got.shape).to(got.dtype), got) else None


def _denominator(w: float) -> int:
    return next((n for n in range(1, 33) if abs(w * n - round(w * n)) < 1e-6), 1)


def line_of(program: Program, node: fx.Node) -> str:
    line = source_line(node)
    return program.name_of(node) if not line or line.startswith("(") else line
