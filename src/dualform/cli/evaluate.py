"""`dualform evaluate`: bits per byte on held-out text, beside counting and gzip."""

from __future__ import annotations

from pathlib import Path

from dualform.cli.output import AsJson, TrustCode, UsageError, load_model, show
from dualform.train.data import PackedRows, byte_tokenizer, load_corpus
from dualform.train.metrics import baselines
from dualform.train.metrics import evaluate as score
from dualform.train.run import run_of
from dualform.train.settings import Settings


def evaluate(
    model: str, /, *, data: str | None = None, seq_len: int | None = None, batch_size: int | None = None,
    trust_code: TrustCode = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Score a model on the held-out part of a text.

    Args:
        model: A folder that `train` wrote.
        data: A file, a folder, or "shakespeare"; its held-out part is scored. Default: what the model was trained on,
            and "shakespeare" for a model outside of a run.
        seq_len: Tokens per row; each row starts with an unread state. Default: as in training, or 128.
        batch_size: Rows at once. Default: as in training, or 16.
        trust_code: Let code run that came with the model, its learner's own file, and say which; without this it is
            refused, unless you ran the same file before on this machine.
        as_json: Print JSON instead of a table.
    """
    for name, value, least in (("seq_len", seq_len, 2), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise UsageError(f"evaluate: {name} is {value}; expected a whole number >= {least}. Change it.")
    lm, tokenizer = load_model(model, trust_code)
    if len(tokenizer) != len(byte_tokenizer()):
        raise UsageError(
            f"{model} has a tokenizer of {len(tokenizer)} tokens; expected bytes, 259. Evaluate byte models here."
        )
    run = run_of(Path(model))
    settings = Settings() if run is None else run.settings
    corpus = run.corpus() if run is not None and data is None else load_corpus(settings.data if data is None else data)
    rows = PackedRows(corpus.test, seq_len or settings.seq_len, keep_rest=True)
    result = score(lm, rows, batch_size=batch_size or settings.batch_size)
    table = [{"model": name, "bits per byte": bits} for name, bits in baselines(corpus.train, corpus.test).items()]
    row = {"model": model, "bits per byte": result.bits_per_byte, "loss": result.loss, "bytes": result.num_bytes}
    table.append(row | {"tokens/s": result.tokens_per_second})
    show(table, f"held-out part of {corpus.name}: {', '.join(d.name for d in corpus.test)}", as_json)
