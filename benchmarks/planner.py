"""Which order of a contraction is right: what the planner chooses beside what was chosen before it, by the clock.

    python benchmarks/planner.py [--rounds 9]      writes benchmarks/results/planner.json

Sides alternate in one process, one thread, by processor time; each is forward, then forward and backward. Ratios are
medians over rounds of (other / chosen): above 1 the planner is right. Four questions, one for each planner that there
was: orders from the tokens (structured weights), the free order of few and of many numbers (contract), a running sum or
a product (the forms).
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from importlib import import_module

import harness
import torch
from opt_einsum.paths import DynamicProgramming

from dualform.algebra.planner import FLOPS_PER_BYTE, Pairing, TokenOrder, token_order
from dualform.algebra.terms import Factor, Label
from dualform.functions import multilinear

contraction = import_module("dualform.algebra.contract")  # the package's name is the function's

# tokens, factors, rows, sizes; and the order of before: where it starts, what is met (None: the other token), what that
# meets
HEADS = {
    "outer, identity": (("g", "h"), ("igh",), "i", {"i": 64, "g": 29, "h": 28}, (0, [None], [0])),
    "outer, loha": (
        ("g", "h"), ("ia", "agh", "ib", "bgh"), "i", {"i": 64, "a": 2, "b": 2, "g": 29, "h": 28},
        (0, [1, 3, None, 2, 0], []),
    ),
    "outer, loha, small": (
        ("g", "h"), ("ia", "agh", "ib", "bgh"), "i", {"i": 10, "a": 2, "b": 2, "g": 13, "h": 12},
        (0, [1, 3, None, 2, 0], []),
    ),
    "kronecker": (("jl",), ("ij", "kl"), "ik", {"i": 2, "j": 12, "k": 5, "l": 12}, (0, [0, 1], [])),
    "two low ranks": (
        ("jl",), ("ib", "bj", "ka", "al"), "ik", {"i": 2, "b": 2, "j": 3, "k": 2, "a": 2, "l": 6},
        (0, [3, 2, 1, 0], []),
    ),
}  # fmt: skip
# operands, result, sizes: near what a core keeps, and beyond
FREE = {
    "masked scores, near": (("sb", "ti", "si", "ts"), "tb", {"t": 128, "b": 16, "s": 128, "i": 3}),
    "two masks, near": (("tuc", "abv", "tuv", "at"), "abc", {"a": 16, "b": 2, "c": 2, "t": 16, "u": 2, "v": 64}),
    "two masks, far": (("tuc", "abv", "tuv", "at"), "abc", {"a": 256, "b": 2, "c": 512, "t": 2, "u": 512, "v": 512}),
    "columns, far": (("tuc", "avb", "tvu", "at"), "abc", {"a": 128, "b": 2, "c": 32, "t": 4, "u": 512, "v": 1024}),
}
SUMS = [(64, 16), (64, 512), (256, 64), (256, 256), (1024, 16), (1024, 128)]  # numbers of a leaf, tokens


def spelled(tokens, factors, rows, start, steps, other):
    """Write out an order given by what is met."""
    partner = "".join(x for k, x in enumerate(tokens) if k != start)

    def walk(labels, met, later):
        found = []
        for n, k in enumerate(met):
            right = joined if k is None else factors[k]
            rest = "".join(partner if m is None else factors[m] for m in met[n + 1 :])
            if None in met[n + 1 :]:
                rest += "".join(factors[m] for m in other)
            out = "".join(x for x in dict.fromkeys(labels + right) if x in later + rest)
            found.append(Pairing(k, labels, right, out))
            labels = out
        return tuple(found), labels

    joined = partner
    if partner:
        outside = rows + tokens[start] + "".join(x for k, x in enumerate(factors) if k not in other)
        before, joined = walk(partner, other, outside)
    else:
        before = ()
    found, labels = walk(tokens[start], steps, rows)
    return TokenOrder(start, labels, found, before)


def head(case, order, batch):
    """Run a structured weight in an order."""
    tokens, factors, rows, sizes, _ = case
    x = [torch.randn(batch, *(sizes[a] for a in labels), requires_grad=True) for labels in tokens]
    w = [torch.randn([sizes[a] for a in labels], requires_grad=True) for labels in factors]

    def run():
        rest = [multilinear._walk(t, order.other, w, sizes, None) for k, t in enumerate(x) if k != order.start]
        y = multilinear._walk(x[order.start], order.steps, w, sizes, *(rest or [None]))
        return multilinear._finish(y, order.labels, rows, sizes)

    return run, [*x, *w]


def contracted(case, minimize):
    """Run a contraction in the order that opt_einsum finds for one measure."""
    operands, out, sizes = case
    label = {x: Label(n, x) for x, n in sizes.items()}
    tensors = [torch.randn([sizes[x] for x in labels], requires_grad=True) for labels in operands]
    factors = [Factor(t, tuple(label[x] for x in labels)) for t, labels in zip(tensors, operands, strict=True)]
    found = DynamicProgramming(minimize, cost_cap=False, search_outer=True)(
        [frozenset(labels) for labels in operands], frozenset(out), sizes
    )
    path = tuple(tuple(sorted(pair)) for pair in found)

    def run():
        contraction.free_order, kept = lambda *_: path, contraction.free_order
        try:
            return contraction.contract(factors, [label[x] for x in out])
        finally:
            contraction.free_order = kept

    return run, tensors


def sums(leaf, W, is_running):
    """Add W gradients, weighted by a lower triangle of products."""
    g, row, col, C = (torch.rand(*s, requires_grad=True) for s in ((W, leaf), (W, 1), (W, 1), (W, W)))
    return (lambda: row * (col * g).cumsum(0), [g, row, col]) if is_running else (lambda: C @ g, [g, C])


def silent(run):
    with torch.no_grad():
        run()


def seconds(run, count):
    start = time.process_time()
    for _ in range(count):
        run()
    return (time.process_time() - start) / count


def race(chosen, other, rounds):
    """Return, forward and with the backward, microseconds of the chosen side and the ratio of the other to it."""
    found = {}
    for what in ("f", "f+b"):
        runs = []
        for run, leaves in (chosen, other):
            runs.append(
                (lambda run=run: silent(run))
                if what == "f"
                else (lambda run=run, leaves=leaves: torch.autograd.grad(run().sum(), leaves))
            )
        counts = [max(1, math.ceil(0.002 / max(1e-6, min(seconds(run, 1) for _ in range(3))))) for run in runs]
        samples = [[], []]
        for n in range(rounds):
            for k in ((0, 1), (1, 0))[n % 2]:
                samples[k].append(seconds(runs[k], counts[k]))
        ratio = statistics.median(b / a for a, b in zip(*samples, strict=True))
        found[what] = {"chosen us": round(1e6 * statistics.median(samples[0]), 1), "other / chosen": round(ratio, 2)}
    return found


def measure(options: argparse.Namespace) -> harness.Found:
    """Race the chosen side of each case with the other."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    told = []

    def note(name, *sides):
        found = race(*sides, options.rounds)
        told.append({"case": name} | {f"{x}, {what}": v for what, part in found.items() for x, v in part.items()})
        print(told[-1], flush=True)

    for name, case in HEADS.items():
        tokens, factors, rows, sizes, before = case
        orders = token_order(tokens, factors, (False,) * len(factors), rows, tuple(sizes.items()))
        old = spelled(tokens, factors, rows, *before)
        assert (orders.steps, orders.other) != (old.steps, old.other), name
        for batch in (32, 1024):
            note(f"{name}, {batch} tokens", head(case, orders, batch), head(case, old, batch))
    combo = f"combo-{round(2 * FLOPS_PER_BYTE)}"
    for name, case in FREE.items():
        chosen, other = ("flops", combo) if "near" in name else (combo, "flops")
        note(f"{name}: {chosen} beside {other}", contracted(case, chosen), contracted(case, other))
    for leaf, W in SUMS:
        runs = W > 8 * FLOPS_PER_BYTE  # what `running` says of float32
        sides = sums(leaf, W, runs), sums(leaf, W, not runs)
        note(f"{'running sum' if runs else 'product'} of {W} tokens, a leaf of {leaf}", *sides)
    return {"rounds": options.rounds, "unit": "processor time", "rows": told}


def report(found: harness.Found) -> str:
    """Spell the table: microseconds of the chosen side, and the other's over them."""
    return harness.rows_table(found["rows"], 2)


if __name__ == "__main__":
    harness.main(measure, report, harness.options(__doc__, rounds=9))
