"""Checkpoint folders, config.json and weights: told apart by tensors' names, read without running any code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from huggingface_hub import save_torch_state_dict
from huggingface_hub.errors import StrictDataclassError

from dualform.models.causal_lm import DualformForCausalLM
from dualform.models.configuration import DualformConfig
from dualform.models.official import Layout, assemble, layout_of, load_official, rename, to_official
from dualform.models.official_config import CheckpointError
from dualform.models.translate import from_jax, from_kernels
from dualform.models.weight_files import no_weights, pickles, read_safetensors, refuse_pickle
from dualform.own_code import CodeError


class Loaded(NamedTuple):
    """A model and the layout that its folder was in."""

    model: DualformForCausalLM
    layout: Layout


def model_folder(path: str | Path) -> Path:
    """Return the folder itself, or the model's in a folder that `train` wrote."""
    folder = Path(path)
    return folder / "model" if (folder / "model" / "config.json").exists() else folder


def read_folder(path: str | Path) -> Loaded:
    """Build the model of a folder in any layout: ours, ttt-lm-pytorch's, ttt-lm-jax's (.npz) or ttt-lm-kernels'.

    Dtype:  parameters take the file's dtype.
    Raises: CheckpointError if a file is missing, damaged or a pickle, and for what the layout's loader refuses.
    Example:
        >>> import tempfile, dualform as df
        >>> folder = tempfile.mkdtemp()
        >>> write_official(df.DualformForCausalLM(df.DualformConfig(preset="tiny-ttt-mlp")), folder)
        >>> read_folder(folder).layout
        'official'
    """
    folder = model_folder(path)
    if folder.suffix in pickles:
        refuse_pickle("read_folder", folder)
    config = _json(folder / "config.json")
    tensors = _tensors(folder)
    layout = layout_of(tensors)
    if layout == "dualform":
        try:
            ours = DualformConfig.from_pretrained(folder)
        except CodeError:
            raise
        except (ValueError, StrictDataclassError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"read_folder: {folder / 'config.json'} is no configuration of ours: {reason}."
            ) from None
        tensors = {name: x for name, x in tensors.items() if not name.endswith(".rate_scale")}
        return Loaded(assemble(ours, rename("read_folder", tensors, ours, "ours", "ours")), layout)
    if layout == "jax":
        tensors, config = from_jax(tensors, config)
    elif layout == "kernels":
        tensors, config = from_kernels(tensors, config)
    return Loaded(load_official(tensors, config), layout)


def write_official(model: DualformForCausalLM, path: str | Path) -> None:
    """Write a model as ttt-lm-pytorch's `from_pretrained` reads it: config.json and safetensors, sharded if large."""
    tensors, config = to_official(model)
    Path(path).mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(tensors, path)
    config = {"architectures": ["TTTForCausalLM"], **config, "torch_dtype": str(model.dtype).removeprefix("torch.")}
    (Path(path) / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _tensors(folder: Path) -> dict[str, Any]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        wanted: Mapping[str, str] = _json(index).get("weight_map", {})
        files = sorted({folder / Path(name).name for name in wanted.values()})
    else:
        wanted, files = {}, sorted(folder.glob("*.safetensors"))
    tensors: dict[str, Any] = {}
    for file in files:
        tensors |= read_safetensors("read_folder", file)
    if lost := sorted(wanted.keys() - tensors.keys()):
        raise CheckpointError(
            f"read_folder: {index.name} lists {lost[0]} in {wanted[lost[0]]}, which does not hold it; expected all of "
            f"its {len(wanted)} tensors, {len(lost)} are missing. Copy the folder again."
        )
    for file in [] if files else sorted(folder.glob("*.npz")):
        tensors |= _npz(file)
    if not tensors:
        no_weights("read_folder", folder, also=" (or *.npz of ttt-lm-jax)")
    return tensors


def _npz(file: Path) -> dict[str, Any]:
    try:
        with np.load(file, allow_pickle=False) as opened:
            return dict(opened)
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise CheckpointError(
            f"read_folder: {file} cannot be read ({error}); expected arrays of numbers under names joined by '/'. Save "
            "it with numpy.savez."
        ) from None


def _json(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"read_folder: {file} cannot be read ({error.strerror}); expected a folder with config.json and "
            "safetensors."
        ) from None
    except ValueError as error:
        raise CheckpointError(f"read_folder: {file} is not JSON ({error}); expected a JSON object.") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"read_folder: {file} holds a {type(document).__name__}; expected a JSON object.")
    return document
