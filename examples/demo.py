"""Train a small language model whose layers learn while they read, and the same model with attention instead.

    make demo        (or: python examples/demo.py [--steps N] [--output DIR])

Both read the same bytes of Shakespeare in the same order; two plays are held out. About three minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers.utils import logging

from dualform import TestTimeTraining
from dualform.cli.output import show
from dualform.train.data import PackedRows, byte_tokenizer, load_corpus
from dualform.train.metrics import baselines, evaluate, plot_loss_by_position, terminal_plot, without_learning
from dualform.train.run import PICTURE, expect_only_a_run, remove_run
from dualform.train.settings import Settings, SettingsError
from dualform.train.training import Outcome, num_parameters, train

presets = {"attention": "tiny-attention", "TTT-MLP": "tiny-ttt-mlp"}


def sample(outcome: Outcome, prompt: str, num_bytes: int) -> str:
    tokenizer = byte_tokenizer()
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]])
    torch.manual_seed(0)
    out = outcome.model.eval().generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_bytes,
        do_sample=True,
        temperature=0.7,
        eos_token_id=None,
    )
    return tokenizer.decode(out[0], skip_special_tokens=True)


def step_seconds(outcome: Outcome, rows: PackedRows, size: int, backend: str) -> float:
    """Time a step's forward and backward pass, the best of three."""
    for module in outcome.model.modules():
        if isinstance(module, TestTimeTraining):
            module.backend = backend
    ids = torch.stack([rows[i]["input_ids"] for i in range(size)])
    outcome.model.train()
    found = []
    for _ in range(4):
        start = time.perf_counter()
        outcome.model(ids, labels=ids).loss.backward()
        found.append(time.perf_counter() - start)
    outcome.model.zero_grad()
    return min(found[1:])


def clear(folder: Path) -> None:
    """Remove what an earlier demo left here, and nothing else:
    a folder that holds anything else is refused as it is."""
    if not folder.exists():
        return
    held = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    runs = [path for path in held if path.name in presets.values()]
    strange = [path for path in held if path not in runs and (not runs or path.name != PICTURE)]
    if strange:
        raise SettingsError(
            f"demo: {strange[0]} is not the demo's; expected --output {folder} to be new, empty, or what a demo wrote. "
            "Name another."
        )
    for run in runs:
        expect_only_a_run(run)
    for run in runs:
        remove_run(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    start = time.perf_counter()
    clear(options.output)
    corpus = load_corpus("shakespeare")
    held_out = PackedRows(corpus.test, options.seq_len, keep_rest=True)
    outcomes: dict[str, Outcome] = {}
    for label, preset in presets.items():
        settings = Settings(
            preset=preset,
            output=str(options.output / preset),
            max_steps=options.steps,
            seq_len=options.seq_len,
            batch_size=options.batch_size,
            learning_rate=5e-3,
            save_steps=options.steps,
        )
        print(
            f"\ntraining {label}: {settings.max_steps} steps of {settings.batch_size} x {settings.seq_len} bytes",
            flush=True,
        )
        outcomes[label] = outcome = train(settings)
        if outcome.evaluation is None:
            return

    learner = outcomes["TTT-MLP"]
    with without_learning(learner.model):
        still = evaluate(learner.model, held_out, batch_size=options.batch_size)
    rows = [{"model": name, "bits per byte": bits} for name, bits in baselines(corpus.train, corpus.test).items()]
    for label, outcome in outcomes.items():
        assert outcome.evaluation is not None
        rows.append(
            {
                "model": label,
                "bits per byte": outcome.evaluation.bits_per_byte,
                "parameters": num_parameters(outcome.model),
                "train tokens/s": outcome.train_tokens_per_second,
            }
        )
    rows.append({"model": "TTT-MLP, inner rate 0", "bits per byte": still.bits_per_byte})
    trained = PackedRows(corpus.train, options.seq_len)
    eager, auto = (1e3 * step_seconds(learner, trained, options.batch_size, name) for name in ("eager", "auto"))
    print()
    show(rows, f"held-out plays: {', '.join(d.name for d in corpus.test)}")

    print(
        f"\na step of TTT-MLP takes {auto:.0f} ms; op by op (backend='eager') {eager:.0f} ms, "
        f"{eager / auto:.1f} times as long"
    )

    curves = {label: o.evaluation.loss_by_position for label, o in outcomes.items() if o.evaluation is not None}
    picture = plot_loss_by_position(
        curves | {"TTT-MLP, inner rate 0": still.loss_by_position}, options.output / PICTURE
    )
    print(f"\nheld-out loss by position\n{terminal_plot(curves)}")
    text = sample(learner, "MACBETH\n", 400)
    print(f"\na sample of TTT-MLP, its weights learning as it writes:\n\n{text}")
    print(f"\nhow one layer learns:\n\n{learner.model.model.layers[0].mixer.explain('one-line')}")
    print(f"\nplot:   {picture}\nmodel:  {learner.folder / 'model'}\ntime:   {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except SettingsError as error:
        sys.exit(str(error))
