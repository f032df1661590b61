"""The proof at `derive`: the first time a structure is seen, its form is compared with the definition on drawn data.

Two problems are drawn, two rows and two heads each: one of whole mini-batches, as most calls are, and one with padding,
resets, a carried state, a cut and tokens of rate 0. In the first head the weights are the learner's own, in the second
these with noise. Outputs, state and the gradients of a random scalar by everything that may have one are compared, in
float64 where the learner can be. The definition goes token by token: of two rows and heads, the second in one problem
being others than in the other, it follows every token, of the rest the first few; where something differs, every token
of all. What was found is remembered on disk.

Legend: B = H = 2, T tokens, b the mini-batch (chunk).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualform.caches import cache_folder
from dualform.learning.problems import WHOLE, Draw, Drawn, differences, largest_entry, outcome
from dualform.learning.sites import DerivationError
from dualform.shapes import TraceError

# The largest error, relative to the largest entry of what is compared, by the least precise dtype that the learner goes
# through.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
MOVES = 0.01  # the state must move the outputs by this share, or nothing is proved of how it learns
_proving: ContextVar[bool] = ContextVar("proving", default=False)


@dataclass(frozen=True)
class Proof:
    """What was compared with the definition: the largest relative error, of what, in how many seconds.

    `unproved`: why parts (or all) could not be compared; `remembered`: was it found on disk?
    """

    form: str
    error: float
    compared: tuple[str, ...]
    seconds: float
    dtype: str
    unproved: tuple[str, ...] = ()
    remembered: bool = False

    def __str__(self) -> str:
        if not self.compared:
            return f"{self.form} not proved: {'; '.join(self.unproved)}"
        when = "remembered" if self.remembered else f"in {self.seconds:.2f} s"
        but = f"; not proved: {'; '.join(self.unproved)}" if self.unproved else ""
        return (
            f"{self.form} == primal to {self.error:.1e} ({self.dtype}; {len(self.compared)} tensors, outer gradients "
            f"among them; {when}){but}"
        )


def is_on(prove: bool) -> bool:
    """Is this the time to prove: asked for, not switched off by DUALFORM_PROVE=0, and no proof under way?"""
    return prove and os.environ.get("DUALFORM_PROVE", "1") != "0" and not _proving.get()


@contextmanager
def _under_way() -> Iterator[None]:
    token = _proving.set(True)
    try:
        yield
    finally:
        _proving.reset(token)


@cache
def _source() -> str:
    """Digest this package's code."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def digest(structure: Any, form: str, device: str) -> str:
    """Key a structure: the three graphs' text and shapes, this package's code, torch, device and form."""
    text = repr((structure, form, device, torch.__version__, _source()))
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def recall(folder: Path, key: str) -> Proof | None:
    """Read a remembered proof; None if there is none that can be read."""
    try:
        held = json.loads((folder / f"{key}.json").read_text())
        lists = {name: tuple(map(str, held[name])) for name in ("compared", "unproved")}
        return Proof(
            str(held["form"]), float(held["error"]), lists["compared"], float(held["seconds"]), str(held["dtype"]),
            lists["unproved"], True,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(folder: Path, key: str, what: dict[str, Any]) -> None:
    """Write down, beside, and rename; a folder that takes nothing is no error."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump(what, file)
        Path(name).replace(folder / f"{key}.json")
    except OSError:
        pass


def kernel(structure: Any, words: Any, compare: Callable[[], str]) -> str:
    """Say what is wrong with a kernel, "" for nothing: as remembered, or as `compare` finds."""
    folder, key = cache_folder() / "proofs", digest(structure, repr(words), "kernel")
    try:
        held = json.loads((folder / f"{key}.json").read_text())
        if held == {"unlike": ""}:
            return ""
        return f"{held['wrong']} It was found so before, and is not tried again until `dualform cache clear`."
    except (OSError, ValueError, KeyError, TypeError):
        pass
    with _under_way(), torch.no_grad():
        found = compare()
    remember(folder, key, {"wrong": found} if found else {"unlike": ""})
    return found


def forget() -> int:
    """Delete all that was remembered, of programs and of kernels; return how much there was."""
    every = [*(cache_folder() / "proofs").glob("*.json")]
    for path in every:
        path.unlink(missing_ok=True)
    return len(every)


def unlike(got: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> str:
    """Name what differs most, and by how much, if by more than a dtype's digits; what is not finite is left out."""
    finite = {n: x for n, x in expected.items() if x.is_floating_point() and bool(x.isfinite().all())}
    found = {n: largest_entry(got[n].to(x) - x) / (largest_entry(x) or 1.0) for n, x in finite.items()}
    worst = max(found, key=lambda n: math.inf if math.isnan(found[n]) else found[n], default="")
    allowed = max(TOLERANCES[d] for d in {dtype, *(x.dtype for x in finite.values())} & TOLERANCES.keys())
    return "" if not worst or found[worst] <= allowed else f"{worst} by {found[worst]:.2g} of the largest entry"


def without_numbers(held: dict[str, Tensor], form: str) -> Proof | None:
    """What is said where something lies on the meta device."""
    name = next((n for n, x in held.items() if x.is_meta), None)
    why = f"{name!r} is on the meta device, where it has no numbers"
    return None if name is None else Proof(form, math.nan, (), 0.0, "", (why,))


def prove(program: Any, K: int, own: torch.dtype, form: str) -> Proof:
    """Compare a program's form, planned in a dtype, with the definition; raise DerivationError where they differ.

    Runs on the CPU (or where what the learner closes over lies), on a copy of the learner's tensors, in float64 where
    the learner can be, else in its own dtype. The graphs are those of its own dtype with the numbers' type exchanged;
    where that does not hold, they are traced again.
    """
    began = time.perf_counter()
    with _under_way(), torch.enable_grad():
        why = ""
        for dtype, retyped in dict.fromkeys(
            [(torch.float64, own != torch.float64), (torch.float64, False), (own, False)]
        ):
            try:
                return _proved(program, K, dtype, retyped, form, began)
            except _Differs as error:
                if not retyped:
                    raise _blamed(program, error, form) from None
            except _CannotRun as error:
                why = str(error)
            except (DerivationError, TraceError):
                if dtype == own and not retyped:
                    raise
            except (RuntimeError, TypeError, LookupError, AssertionError) as error:
                if dtype == own and not retyped:
                    text = str(error).partition("\n")[0]
                    fault = "This is a fault of dualform, please report it: form='primal' is the definition."
                    torch_s = "Torch has no such derivative: detach what that op gives, or write it with other ops."
                    raise DerivationError(
                        f"derive: form {form!r} fails with {type(error).__name__} ({text}); expected a program that "
                        f"runs. {torch_s if 'derivative for' in text else fault}"
                    ) from error
        return Proof(form, math.nan, (), time.perf_counter() - began, "", (f"the definition cannot run: {why}",))


class _CannotRun(Exception):
    """The definition raises."""


class _Differs(Exception):
    """Something differs: what, by how much, the problem and the expected outcome."""

    def __init__(self, found: dict[str, float], allowed: float, problem: Drawn, expected: dict[str, Tensor]) -> None:
        super().__init__()
        self.name = max(found, key=lambda n: found[n] / _digits(expected[n], allowed))
        self.error, self.allowed = found[self.name], _digits(expected[self.name], allowed)
        self.problem, self.expected = problem, expected


def _digits(x: Tensor, allowed: float) -> float:
    """The gradient of a tensor that the user's code closes over is summed in that tensor's own type."""
    return max(allowed, TOLERANCES.get(x.dtype, 0.0))


def _agrees(found: dict[str, float], expected: dict[str, Tensor], allowed: float) -> bool:
    return all(error <= _digits(expected[n], allowed) for n, error in found.items())


def _proved(program: Any, K: int, dtype: torch.dtype, retyped: bool, form: str, began: float) -> Proof:
    derivation, b = program.plan_again(K, dtype, form, retyped).derivation, program.chunk
    allowed = max(TOLERANCES[d] for d in {dtype, *_dtypes(derivation)})
    blocked = program if b <= WHOLE else program.in_blocks(WHOLE)
    name = str(dtype).removeprefix("torch.")
    for noise in (0.2, 0.02, 0.0):
        draw = partial(Draw, program, K, derivation.V, dtype, noise)
        rate, moved = _rate(draw, blocked, form)
        problems = [draw().problem(_tokens(b, ragged), rate, ragged) for ragged in (False, True)]
        found = _compared(program, blocked, form, problems, allowed)
        if found is not None:
            break
    else:
        why = ("the definition is not finite on drawn data",)
        return Proof(form, math.nan, (), time.perf_counter() - began, name, why)
    worst, names = found
    if blocked is not program:
        long = draw().problem(b + 3, rate, False)
        long = replace(long, position=None, reach=dict.fromkeys(long.reach, b + 3))
        right, got = (_derived(long, program, side, form) for side in (blocked, program))
        worst = max(worst, _agreed(got, right, allowed, long))
    silent = _silent(program, form, blocked, problems[0])
    notes = [f"{n}, whose gradients are all zero" for n in silent]
    if noise == 0.0:
        notes.append("values other than the learner's own, where the definition is not finite")
    if moved < MOVES:
        notes.append(f"how the state learns, which moves the outputs by {100 * moved:.2g} % only")
    return Proof(form, worst, names, time.perf_counter() - began, name, tuple(notes))


def _tokens(b: int, ragged: bool) -> int:
    return (b + 4 if ragged else 2 * b) if b <= WHOLE else WHOLE + 8


def _inputs(program: Any, problem: Drawn) -> dict[str, Tensor]:
    """All that has a gradient: what was drawn, and the tensors that the user's code closes over."""
    return problem.leaves | {n: x for n, x in program.parts.closed.items() if x.requires_grad}


def _compared(
    program: Any, blocked: Any, form: str, problems: list[Drawn], allowed: float
) -> tuple[float, tuple[str, ...]] | None:
    """Return the largest error and what was compared; None where the definition is not finite."""
    error, names = 0.0, dict[str, None]()
    for problem in problems:
        for one in (problem, replace(problem, reach=dict.fromkeys(problem.reach, problem.tokens))):
            right = _definition(program, one)
            if not all(bool(x.isfinite().all()) for x in right.values()):
                return None
            found = differences(_derived(one, program, blocked, form), right)
            if _agrees(found, right, allowed):
                break
        else:
            raise _Differs(found, allowed, one, right)
        error, names = max(error, *found.values()), names | dict.fromkeys(right)
    return error, tuple(names)


def _derived(problem: Drawn, program: Any, blocked: Any, form: str) -> dict[str, Tensor]:
    results = problem.followed(problem.run(blocked, form, backend="eager", remat=None))
    return outcome(results, _inputs(program, problem))


def _definition(program: Any, problem: Drawn) -> dict[str, Tensor]:
    try:
        return outcome(problem.defined(program), _inputs(program, problem))
    except Exception as error:  # the user's code, run as it is
        raise _CannotRun(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error


def _silent(program: Any, form: str, blocked: Any, problem: Drawn) -> list[str]:
    """List the leaves that no output depends on, neither as they begin nor as they are carried."""
    o, _ = problem.run(blocked, form, backend="eager", remat=None)
    scalar = (o * torch.randn(o.shape, generator=torch.Generator().manual_seed(2)).to(o)).sum()
    leaves = {**problem.part("param."), **problem.part("anchor.")}
    grads = torch.autograd.grad(scalar, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return [name for name, g in zip(leaves, grads, strict=True) if not bool(g.any())]


def _agreed(got: dict[str, Tensor], expected: dict[str, Tensor], allowed: float, problem: Drawn) -> float:
    found = differences(got, expected)
    if not _agrees(found, expected, allowed):
        raise _Differs(found, allowed, problem, expected)
    return max(found.values())


def _dtypes(derivation: Any) -> set[torch.dtype]:
    """The floating dtypes that the learner and the objective go through."""
    graphs = [*derivation.analyses.values(), *(r.analysis for r in derivation.losses.values())]
    found = {n.meta["val"].dtype for a in graphs for n in a.nodes if isinstance(n.meta.get("val"), Tensor)}
    return (found - {derivation.source.dtype} if derivation.source else found) & TOLERANCES.keys()


def _rate(draw: Callable[[], Draw], program: Any, form: str) -> tuple[float, float]:
    """Find a rate at which the state moves the outputs by some percent, and by how much it does."""
    if "lr" not in program.rule.gates:
        return 1.0, 1.0
    drawn = draw().problem(_tokens(program.chunk, False), 1.0, False)

    def outputs(rate: float) -> Tensor:
        with torch.no_grad():
            leaves = drawn.leaves | {"gate.lr": rate * drawn.leaves["gate.lr"]}
            return replace(drawn, leaves=leaves).run(program, form, backend="eager", remat=None)[0]

    rate, still, moved = 0.01, outputs(0.0), 0.0
    for _ in range(12):
        moved = largest_entry(outputs(rate) - still) / (largest_entry(still) or 1.0)
        if not moved <= 0.5:
            rate /= 8
        elif moved < 2 * MOVES:
            rate *= 64 if moved == 0 else min(64.0, 8 * MOVES / moved)
        else:
            break
    return rate, moved


def _blamed(program: Any, differs: _Differs, form: str) -> DerivationError:
    """Say what differs, by how much, and the first line whose weights, formed per token, repair it."""
    problem, where = differs.problem, ""
    K, dtype = problem.leaves["k"].shape[-1], problem.leaves["k"].dtype
    for site, line in enumerate(program.plan(K, dtype, form).derivation.site_lines()):
        try:
            spelled = program.with_site_per_token(site)
            got = _derived(problem, program, spelled, "auto")
        except (RuntimeError, ValueError, KeyError, AssertionError):
            continue
        if max(differences(got, differs.expected).values()) <= differs.allowed:
            where = f", at {line}"
            break
    return DerivationError(
        f"derive: form {form!r} and the definition differ in {differs.name} by {differs.error:.2g} of its largest "
        f"entry{where}; expected at most {differs.allowed:.0e} in {dtype}. This is a fault of dualform, please report "
        "it: form='primal' is the definition, prove=False goes on as it is."
    )
