"""Checkpoints of the two other official programs, ttt-lm-jax and ttt-lm-kernels, in the layout of ttt-lm-pytorch.

`load_official(*from_jax(params, config))`; `load_official(*from_kernels(state_dict, config))`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dualform.models.official import axis_sizes, rename, tensor_places
from dualform.models.official_config import CheckpointError, read_config

# JAX: its names of fields, and what its name of the layer says: the kind of inner model and the backbone.
_jax_fields = {"conv_width": "conv_kernel"}
_jax_layers = {
    "ttt_linear": {"ttt_layer_type": "linear", "use_gate": True, "share_qk": True},
    "ttt_mlp": {"ttt_layer_type": "mlp", "use_gate": True, "share_qk": True},
    "ttt_linear_base": {"ttt_layer_type": "linear", "use_gate": False, "share_qk": False},
    "ttt_mlp_base": {"ttt_layer_type": "mlp", "use_gate": False, "share_qk": False},
}
# What its code registers under one key with a slash in it.
_jax_one_key = ("learnable_ttt_lr", "ttt_norm")
# Kernels: always the Mamba backbone; here each of its tensors is the official ones whose rows it stacks.
_kernel_fields = {"conv_before_ttt": "pre_conv"}
_kernel_layers = {
    name + fast: _jax_layers[name.replace("-", "_")] for name in ("ttt-linear", "ttt-mlp") for fast in ("", "-fast")
}
_kernel_defaults = {"vocab_size": 50277, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
_kernel_rows = {
    "seq_modeling_block.qkv_learnable_ttt_lr_proj.weight": (
        "seq_modeling_block.q_proj.weight",
        "seq_modeling_block.g_proj.weight",
        "seq_modeling_block.v_proj.weight",
        "seq_modeling_block.learnable_ttt_lr_weight",
    ),
    "seq_modeling_block.learnable_token_idx_bias": ("seq_modeling_block.learnable_token_idx",),
    "mlp.up_gate_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "conv_norm.weight": ("conv.norm.weight",),
}


def from_jax(params: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state dict and configuration, in the layout of ttt-lm-pytorch, of a ttt-lm-jax checkpoint.

    `params` is its nested mapping of arrays (an outer "params" is looked through), or a flat one with names joined by
    "/". `config` is in JAX's own terms (`seq_modeling_block`, `conv_width`) or in ttt-lm-pytorch's.
    Shape:  dense kernels (in, out) -> (out, in); convolutions (n, 1, d) -> (d, 1, n); rates (H, d, 1) -> (H, 1, d).
    Dtype:  as the arrays; bfloat16 too, also where numpy shows it as two raw bytes.
    Raises: CheckpointError for missing and extra names, wrong shapes, mixed dtypes, an unknown layer.
    Source: ttt-lm-jax, `ttt/models`.
    Example:
        >>> import dualform as df
        >>> lm = df.DualformForCausalLM(df.DualformConfig(preset="tiny-ttt-linear", use_gate=True, share_qk=True))
        >>> params, config = df.models.to_jax(*df.models.to_official(lm))
        >>> params["model"]["h"]["0"]["feed_forward"]["w1"]["kernel"].shape
        (128, 344)
        >>> df.models.from_jax(params, config)[0].keys() == df.models.to_official(lm)[0].keys()
        True
    """
    flat = _flatten(params)
    while flat and all(name.startswith("params/") for name in flat):
        flat = {name.removeprefix("params/"): x for name, x in flat.items()}
    fields = _fields("from_jax", config, _jax_fields, _jax_layers)
    if "seq_modeling_block" in config and "tie_word_embeddings" not in config:
        fields["tie_word_embeddings"] = not any(name.startswith("lm_head/") for name in flat)
    tensors = {name: _tensor(x) for name, x in flat.items()}
    tensors = rename("from_jax", tensors, read_config(fields), "jax", "official")
    # A tied head has no place in JAX.
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].clone())
    return tensors, fields


def to_jax(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the nested mapping of arrays that ttt-lm-jax calls params["params"], and its configuration.

    Shape:  as `from_jax`, the other way. A tied head has no place there.
    Dtype:  as the tensors, which numpy must know: not bfloat16.
    Raises: CheckpointError for what `load_official` refuses, and for a backbone that is neither of JAX's two.
    Source: ttt-lm-jax, `ttt/models`.
    Example:
        >>> import dualform as df
        >>> lm = df.DualformForCausalLM(df.DualformConfig(preset="tiny-ttt-mlp"))
        >>> df.models.to_jax(*df.models.to_official(lm))[1]["seq_modeling_block"]
        'ttt_mlp_base'
    """
    ours = read_config(config)
    fields = {name: value for name, value in config.items() if name not in _jax_layers["ttt_linear"]}
    kind = config.get("ttt_layer_type", "linear")
    own = {"ttt_layer_type": kind, "use_gate": ours.use_gate, "share_qk": ours.share_qk}
    block = next((name for name, layer in _jax_layers.items() if layer == own), None)
    if block is None:
        raise CheckpointError(
            f"to_jax: use_gate is {ours.use_gate} and share_qk {ours.share_qk}; expected both or neither. ttt-lm-jax "
            "knows no other backbone."
        )
    flat = rename("to_jax", state_dict, ours, "official", "jax")
    if any(x.dtype == torch.bfloat16 for x in flat.values()):
        raise CheckpointError(
            "to_jax: state_dict is torch.bfloat16, which numpy lacks; expected float32. Cast it: x.float()."
        )
    if ours.tie_word_embeddings:
        flat.pop("lm_head/kernel", None)
    params: dict[str, Any] = {}
    for name, x in flat.items():
        *folders, leaf = name.split("/")
        if folders[-1:] and folders[-1] in _jax_one_key:
            leaf = f"{folders.pop()}/{leaf}"
        place = params
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = x.contiguous().numpy(force=True)
    for theirs, name in _jax_fields.items():
        fields[theirs] = fields.pop(name, getattr(ours, name))
    return params, {**fields, "seq_modeling_block": block}


def from_kernels(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any], *, rotary: Literal["halves", "pairs"] = "halves"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state dict and configuration, in the layout of ttt-lm-pytorch, of a ttt-lm-kernels checkpoint.

    Its rotary positions turn the channels (i, i + f/2) of a head, where the other two programs turn (2i, 2i + 1).
    With rotary="halves" every head's channels are put into the other order, in all tensors that have them, so that the
    function is the one its prefill computes. With "pairs" they stay: for official weights that were only fused.
    Shape:  its fused projections are cut: (3 d + H, d) into q, gate, v, rate; (2 ff, d) into gate, up.
    Dtype:  as the tensors.
    Raises: CheckpointError for missing and extra names, wrong shapes, mixed dtypes, an unknown layer.
    Source: ttt-lm-kernels, `ttt/modeling_ttt.py`. Differs: k is convolved with its own filter in decoding too.
    """
    if rotary not in ("halves", "pairs"):
        raise CheckpointError(f"from_kernels: rotary is {rotary!r}; expected 'halves' or 'pairs'. Choose one of them.")
    fields = _fields("from_kernels", config, _kernel_fields, _kernel_layers)
    fields = {**_kernel_defaults, **fields, "use_gate": True, "share_qk": True}
    ours = read_config(fields)
    sizes = axis_sizes(ours)
    places = {p["official"].name: p["official"] for p in tensor_places(ours)}
    tensors: dict[str, Tensor] = {}
    for name, x in state_dict.items():
        tail = next((tail for tail in _kernel_rows if name.endswith("." + tail)), "")
        parts = [name.removesuffix(tail) + part for part in _kernel_rows.get(tail, ("",))]
        if any(part not in places for part in parts):
            tensors[name] = x  # `rename` will say that nothing is called so
            continue
        shapes = [places[part].shape(sizes) for part in parts]
        counts = [math.prod(shape) for shape in shapes]
        stacked = _without_ones(shapes[0]) if len(parts) == 1 else [sum(counts) // shapes[0][-1], shapes[0][-1]]
        if _without_ones(x.shape) != stacked:
            raise CheckpointError(
                f"from_kernels: {name} has shape {tuple(x.shape)}; expected {tuple(stacked)} but for axes of one, the "
                f"rows of {', '.join(parts)}. Check the config, or the file."
            )
        pieces = x.flatten().split(counts)
        tensors |= {part: y.view(shape) for part, shape, y in zip(parts, shapes, pieces, strict=True)}
    tensors = rename("from_kernels", tensors, ours, "official", "official")
    if rotary == "halves":
        tensors = {name: _interleave(x, places[name].axes, sizes["f"]) for name, x in tensors.items()}
    return tensors, fields


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    return [n for n in shape if n != 1]


def _interleave(x: Tensor, axes: tuple[str, ...], f: int) -> Tensor:
    """Put every head's channels 0 ... f-1 into the order 0, f/2, 1, f/2 + 1, ..."""
    order = torch.arange(f, device=x.device).view(2, f // 2).T.flatten()
    for axis, letter in enumerate(axes):
        if letter in ("c", "f"):
            heads = torch.arange(0, x.shape[axis], f, device=x.device)
            x = x.index_select(axis, (heads[:, None] + order).flatten())
    return x


def _fields(
    function: str, config: Mapping[str, Any], renamed: Mapping[str, str], layers: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return a configuration in ttt-lm-pytorch's terms, whichever of the two it was in."""
    fields = {renamed.get(name, name): value for name, value in config.items()}
    block = fields.pop("seq_modeling_block", None)
    if block is None:
        return fields
    if block not in layers:
        raise CheckpointError(
            f"{function}: seq_modeling_block is {block!r}; expected one of {', '.join(map(repr, layers))}. Other "
            "models of that program are not test-time training."
        )
    return {**fields, **layers[block]}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, x in tree.items():
        flat |= _flatten(x, f"{prefix}{name}/") if isinstance(x, Mapping) else {f"{prefix}{name}": x}
    return flat


def _tensor(x: Any) -> Tensor:
    if isinstance(x, Tensor):
        return x
    array = np.array(x)  # a copy: arrays of other programs may be read-only
    if array.dtype.name == "bfloat16" or array.dtype == np.dtype("V2"):
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
