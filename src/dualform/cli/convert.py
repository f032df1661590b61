"""`dualform convert`: a checkpoint folder from one layout into another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from dualform.cli.output import TrustCode, UsageError, tell_trusted
from dualform.models.folder import model_folder, read_folder, write_official
from dualform.train.training import num_parameters

# What else a model's folder holds and both layouts share.
_kept = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.jinja")


def convert(
    source: Path, target: Path, /, *, to: Literal["official", "dualform"] | None = None,
    trust_code: TrustCode = False,
) -> None:  # fmt: skip
    """Convert a model's folder to or from the layout of ttt-lm-pytorch.

    Args:
        source: A folder with config.json and *.safetensors, sharded or not: ours, of ttt-lm-pytorch or of
            ttt-lm-kernels; or with config.json and a *.npz of ttt-lm-jax (names joined by "/"). Pickles are refused.
        target: The folder to write.
        to: The layout to write: "dualform" unless the source is that already, else "official" (ttt-lm-pytorch).
        trust_code: Let code run that came with the model, its learner's own file, and say which; without this it is
            refused, unless you ran the same file before on this machine.
    """
    if not source.exists():
        raise UsageError(
            f"convert: {source} does not exist; expected a folder with config.json. Pass a model's folder."
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(
            f"convert: {target} is not empty; expected a new folder, so that nothing is lost. Name another."
        )
    if trust_code:
        tell_trusted(model_folder(source))
    model, layout = read_folder(source)
    to = to or ("official" if layout == "dualform" else "dualform")
    if to == layout:
        other = "dualform" if to == "official" else "official"
        raise UsageError(f"convert: {source} is in the layout {layout!r} already; expected another. Pass --to {other}.")
    if to == "official":
        write_official(model, target)
    else:
        model.save_pretrained(target)
    for pattern in _kept:
        for file in model_folder(source).glob(pattern):
            shutil.copy(file, target)
    kind = str(model.dtype).removeprefix("torch.")
    print(f"{layout} -> {to}: {target}, {num_parameters(model):,} parameters, {kind}")
