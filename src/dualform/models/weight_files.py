"""Weights on disk: safetensors, which run nobody's code when they are read; pickles and damaged files are named."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dualform.models.official_config import CheckpointError

pickles = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def read_safetensors(function: str, file: Path, names_only: bool = False) -> dict[str, Tensor | None]:
    """Return a file's tensors by name, or only their names, on behalf of `function`."""
    try:
        with safe_open(str(file), "pt") as opened:
            return {name: None if names_only else opened.get_tensor(name) for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{function}: {file} cannot be read ({error}); expected a whole safetensors file. Copy it again."
        ) from None


def check_weights(function: str, folder: Path) -> None:
    """Refuse a folder whose weights are damaged, pickled or not there."""
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        read_safetensors(function, file, names_only=True)
    if not files:
        no_weights(function, folder)


def no_weights(function: str, folder: Path, also: str = "") -> NoReturn:
    """Say what a folder without safetensors holds in their place."""
    for file in sorted(folder.iterdir()):
        if file.suffix in pickles:
            refuse_pickle(function, file)
    raise CheckpointError(f"{function}: {folder} holds no weights; expected *.safetensors{also} beside config.json.")


def refuse_pickle(function: str, file: Path) -> NoReturn:
    raise CheckpointError(
        f"{function}: {file} is a pickle, which can run code when it is read; expected safetensors. Convert it where "
        "you "
        'trust it: state_dict = torch.load("'
        f'{file.name}", weights_only=True); safetensors.torch.save_file({{name: x.clone() for name, x in '
        'state_dict.items()}, "model.safetensors").'
    )
