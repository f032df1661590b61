"""`dualform evaluate`: bits per byte on held-out text, beside counting and gzip."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from dualform.cli.output import UsageError, load_model, show
from dualform.train.data import PackedRows, byte_tokenizer, load_corpus
from dualform.train.metrics import baselines
from dualform.train.metrics import evaluate as score


def evaluate(
    model: str,
    /,
    *,
    data: str = "shakespeare",
    seq_len: int = 128,
    batch_size: int = 16,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Score a model on the held-out part of a text.

    Parameters
    ----------
    model
        A folder that `train` wrote.
    data
        A file, a folder, or "shakespeare"; its held-out part is scored.
    seq_len
        Tokens per row; each row starts with an unread state.
    batch_size
        Rows at once.
    as_json
        Print JSON instead of a table.
    """
    corpus = load_corpus(data)
    rows = PackedRows(corpus.test, seq_len, keep_rest=True)
    lm, tokenizer = load_model(model)
    if len(tokenizer) != len(byte_tokenizer()):
        raise UsageError(
            f"{model} has a tokenizer of {len(tokenizer)} tokens; expected bytes, 259. Evaluate byte models here."
        )
    result = score(lm, rows, batch_size=batch_size)
    table = [{"model": name, "bits per byte": bits} for name, bits in baselines(corpus.train, corpus.test).items()]
    table.append(
        {
            "model": model,
            "bits per byte": result.bits_per_byte,
            "loss": result.loss,
            "bytes": result.num_bytes,
            "tokens/s": result.tokens_per_second,
        }
    )
    show(table, f"held-out part of {corpus.name}: {', '.join(d.name for d in corpus.test)}", as_json)
