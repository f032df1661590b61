"""Every derivative of PyTorch's own operator database beside torch.autograd.

    python benchmarks/operator_database.py [--samples 4] [--seconds 60] [--only conv,linalg] [--second]

writes benchmarks/results/operator_database.json and .md; needs torch.testing's own requirement, expecttest. A sample is
a call that PyTorch tests its gradients on, in float64: at most so many of an operator, spread over its list. Each of
its arguments with a gradient is differentiated, as `df.jacobian(f, x)` and by torch.autograd. A sample is

    right     every entry agrees, or is autograd's nan
    apart     torch.autograd itself raises, or the call draws random numbers: there is nothing to compare with
    refused   by an error that says why, of ours
    wrong     an entry differs, or an error that is not ours: each is listed

--second: Hessians of the sum of the squared result, too, where torch.autograd has them.
"""

from __future__ import annotations

import argparse
import re
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import harness
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import dualform as df
from dualform.shapes import ShapeError, TraceError

MOST = 1 << 20  # entries of a derivative that is written out; of a larger one its vjp is compared
ORDER = ("right", "apart", "refused", "wrong")


class Late(Exception):
    """The processor time of a sample is up."""


@contextmanager
def within(limit: float) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise Late

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def operators(only: str, samples: int) -> Iterator[tuple[str, Callable[..., Any], Any]]:
    """Name, function and sample of the calls whose gradients PyTorch tests."""
    from torch.testing._internal.common_methods_invocations import op_db

    for op in op_db:
        name = f"{op.name} {op.variant_test_name}".strip()
        if not op.supports_autograd or torch.float64 not in op.supported_dtypes("cpu"):
            continue
        if only and not any(word in name for word in only.split(",")):
            continue
        torch.manual_seed(0)
        found = list(op.sample_inputs("cpu", torch.float64, requires_grad=True))
        count = min(samples, len(found))
        for k in range(count):
            at = k * (len(found) - 1) // max(count - 1, 1)
            yield f"{name} [{at}]", op, found[at]


class Draws(TorchDispatchMode):
    """Watch for ops that draw random numbers."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **kwargs or {})


def real(result: Any) -> Tensor:
    """The results that have a gradient, as one vector of real numbers."""
    found = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
    moving = [x for x in found if x.is_floating_point() or x.is_complex()]
    parts = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in moving]
    return parts[0] if len(parts) == 1 else torch.cat([x.reshape(-1) for x in parts])


def functions(op: Any, sample: Any) -> list[tuple[Callable[[Tensor], Tensor], Tensor]]:
    """The sample's call as a function of each tensor with a gradient."""
    leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
    chosen = [k for k, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad and x.is_floating_point()]
    kept = [x.detach() if isinstance(x, Tensor) else x for x in leaves]

    def of(k: int) -> Callable[[Tensor], Tensor]:
        def f(x: Tensor) -> Tensor:
            own = list(kept)
            own[k] = x
            first, args, kwargs = pytree.tree_unflatten(own, spec)
            return real(sample.output_process_fn_grad(op.op(first, *args, **kwargs)))

        return f

    return [(of(k), kept[k]) for k in chosen]


def compared(f: Callable[[Tensor], Tensor], x: Tensor, second: bool) -> tuple[str, str, float]:
    """How one derivative came out: a word, what there is to say, and the largest error."""
    try:
        with Draws() as draws:
            out = f(x)
        if draws.found and not torch.equal(out, f(x)):
            return "apart", "random", 0.0
        if second:
            want = torch.autograd.functional.hessian(lambda x: f(x).square().sum(), x)
        elif out.numel() * x.numel() <= MOST:
            want = torch.autograd.functional.jacobian(f, x)
        else:
            g = torch.randn_like(out)
            want = torch.autograd.functional.vjp(f, x, g)[1]
    except Late:
        raise
    except Exception as error:
        return "apart", f"{type(error).__name__}: {error}"[:160], 0.0
    try:
        if second:
            got = df.hessian(lambda x: f(x).square().sum(), x).dense()
        else:
            J = df.jacobian(f, x)
            got = J.dense() if out.numel() * x.numel() <= MOST else J.vjp(g)  # pyright: ignore[reportPossiblyUnboundVariable]
    except Late:
        raise
    except (TraceError, ShapeError) as error:
        return "apart" if draws.found else "refused", str(error), 0.0
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}"[:300], 0.0
    got, want = got.reshape(-1), want.reshape(-1)  # pyright: ignore[reportAttributeAccessIssue]
    if got.shape != want.shape:
        return "wrong", f"{len(got)} entries for {len(want)}", 0.0
    alike = (got == want) | want.isnan()
    apart = torch.where(alike, 0.0, (got - want).abs())
    scale = want.nan_to_num(0, 0, 0).abs().max().clamp(min=1).item() if want.numel() else 1.0
    error = apart.max().item() / scale if apart.numel() else 0.0
    close = error < torch.finfo(want.dtype).eps ** 0.5
    return ("right" if close else "wrong", "" if close else f"error {error:.1e}", error)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    counts, told, dense, worst = Counter[str](), list[dict[str, Any]](), set[str](), 0.0
    for name, op, sample in operators(options.only, options.samples):
        found: list[tuple[str, str, float]] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with within(options.seconds):
                    found = [compared(f, x, options.second) for f, x in functions(op, sample)]
            except Late:
                found.append(("refused", f"not done in {options.seconds} s", 0.0))
        dense |= {m[1] for w in caught if (m := re.search(r"dualform: (\S+) has no derivative row", str(w.message)))}
        if not found:
            continue
        word, why, error = max(found, key=lambda one: ORDER.index(one[0]))
        counts[word] += 1
        worst = max(worst, error if word == "right" else 0.0)
        if word not in ("right", "apart"):
            told.append({"sample": name, "came out": word, "why": re.sub(r"\s+", " ", why)[:200]})
            print(name, word, why[:300].replace("\n", " "), flush=True)
        elif options.only and word != "right":
            print(name, word, why[:300])
    return {
        "samples": sum(counts.values()), "counts": dict(counts), "largest error of the right ones": worst,
        "told": told, "dense": sorted(dense), "of an operator": options.samples, "second": options.second,
    }  # fmt: skip


def report(found: dict[str, Any]) -> str:
    counts = found["counts"]
    compared_ = found["samples"] - counts.get("apart", 0)
    share = counts.get("refused", 0) / max(compared_, 1)
    text = (
        f"{found['samples']:,} samples of PyTorch's operator database (torch {found['versions']['torch']}), at most "
        f"{found['of an operator']} of an operator; {compared_:,} have a float64 gradient by torch.autograd: "
        f"{counts.get('right', 0):,} right (largest error {found['largest error of the right ones']:.0e} of the largest "
        f"entry), {counts.get('wrong', 0)} wrong, {counts.get('refused', 0)} refused ({share:.2%}).\n\n"
    )
    rows = [[f"`{one['sample']}`", one["came out"], one["why"].replace("|", "\\|")] for one in found["told"]]
    text += harness.table(["sample", "came out", "why"], rows) if rows else ""
    named = ", ".join(f"`{name}`" for name in found["dense"])
    return text + (f"\nStored dense, for want of a row: {named}.\n" if named else "")


if __name__ == "__main__":
    harness.main(
        measure, report, harness.options(__doc__, samples=4, seconds=60.0, only="", second=False), "expecttest"
    )
