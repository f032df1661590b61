"""Write what pages show of generated kernels and of results between their marks: python docs/generated.py."""

import json
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"
PAGES = [HERE.parent / "README.md", HERE / "learner_to_kernel.md"]
MARK = re.compile(r"(<!-- generated: (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

# Where a stretch of TTT-Linear's kernel begins: at the first line that starts so.
STRETCHES = {
    "signature": "def forward",
    "row": "row =",
    "once": "arange =",
    "loop": "for n in",
    "rule": "gates_lr =",
    "keys": "k =",
    "gradient": "v =",
    "queries": "q =",
    "output": "tl.store(o_at",
    "next": "mul_13 =",
    "end": "tl.store(th_",
}


def stretches() -> dict[str, list[str]]:
    """Cut the forward kernel of TTT-Linear where it turns to something else."""
    import dualform as df

    learner = df.learners.residual_norm(df.learners.Linear())(64)
    rule = df.rules.SGD(lr=0.1, averaged=True)
    program = df.derive(learner, df.objectives.Squared("v-k"), rule, chunk=16)
    lines = str(program.schedule("triton")["forward"]).splitlines()
    starts = [next(k for k, x in enumerate(lines) if x.strip().startswith(begin)) for begin in STRETCHES.values()]
    assert starts == sorted(starts), dict(zip(STRETCHES, starts, strict=True))
    ends = [*starts[1:], len(lines)]
    return {n: lines[a:b] for n, a, b in zip(STRETCHES, starts, ends, strict=True)}


def kernel(name: str) -> str:
    """Show a stretch; of arguments and addresses, which all tensors have alike, those of q and o alone."""
    lines = stretches()[name]
    if name == "signature":
        head, words, tail = re.split(r"(?<=\()(.*)(?=\):)", lines[0])
        kept = [x for x in words.split(", ") if re.match(r"[qoHcgSG]_|[a-zHGS]+(:|$)", x)]
        own, numbers = [x for x in kept if x[:2] in ("q_", "o_")], [x for x in kept if x[:2] not in ("q_", "o_")]
        lines = [f"{head}", f"    {', '.join(own)}, ...,", f"    {', '.join(numbers)},", f"{tail}"]
    elif name in ("row", "loop"):
        lines = [x for x in lines if not re.match(r"\s*\w+_(row|at) \+?= ", x) or re.match(r"\s*[qo]_", x)]
    return "\n".join(["```{code-block} python", *lines, "```", ""])


def gpu_rows(_: str) -> str:
    """Spell the README's table of one card: what was asked for beside what was reached."""
    sys.path.insert(0, str(HERE.parent / "benchmarks"))
    reaches = import_module("gpu_kernels").REACH

    cases = json.loads((RESULTS / "gpu_kernels.json").read_text())["cases"]
    peers = {(c["B"], c["chunk"]): c["fla"]["both, call"] for c in cases if c["kind"] == "peers" and "fla" in c}
    head = [
        "learner, shape, mini-batch",
        "ours op by op",
        "best public kernel",
        "ours as generated Triton",
        "asked for",
    ]
    rows = [head, ["---"] * len(head)]
    for c in cases:
        reach = reaches.get((c.get("learner"), c["B"], c["chunk"]))
        if c["kind"] != "ours" or reach is None or c["d"] != 64 or c["rule"] != "averaged":
            continue
        peer = peers.get((c["B"], c["chunk"])) if c["learner"] == "TTT-Linear" else None
        call, kernels = c.get("both, call"), c.get("both, kernels")
        alone = f" ({kernels:.2f})" if kernels else ""
        ours = f"**{call:.2f}**{alone}" if call else "does not fit"
        miss = "not reached" if not call else "reached" if call <= reach else f"missed by {call / reach:.1f}x"
        rows.append([
            f"{c['learner']}, B{c['B']} T{c['T']} H{c['H']}, {c['chunk']}",
            f"{c['both, eager']:.0f}" if "both, eager" in c else "-", f"{peer:.2f}" if peer else "-", ours,
            f"{reach:.2f}: {miss}",
        ])  # fmt: skip
    return "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows) + "\n"


def generated(name: str) -> str:
    kinds: dict[str, Callable[[str], str]] = {"kernel": kernel, "gpu": gpu_rows}
    kind, _, word = name.partition(" ")
    return kinds[kind](word)


def written(page: str) -> str:
    """Return a page with what is between its marks as it is today."""
    return MARK.sub(lambda m: f"{m[1]}{generated(m[2])}{m[4]}", page)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page.read_text()))
