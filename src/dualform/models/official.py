"""The official models: the names of their tensors and fields beside ours, as data; from them weights go both ways.

A tensor's place is its name and its axes, "W1: H f h". Two places of one tensor have the same axes up to order and
axes of one, so that the way from one to the other is read off them.

Axes: V vocabulary, d width, c = H f channels of the heads, m SwiGLU width, H heads, f head width, h = 4 f hidden width
of the inner MLP, b mini-batch, n kernel of the short convolutions, 1 one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dualform.learning.layer import TestTimeTraining
from dualform.models.causal_lm import DualformForCausalLM
from dualform.models.configuration import DualformConfig
from dualform.models.official_config import CheckpointError, kind_of, kinds, read_config, write_config


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies in one layout: its name there and the letters of its axes."""

    name: str
    axes: tuple[str, ...]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(sizes[axis] for axis in self.axes)

    def describe(self, sizes: Mapping[str, int]) -> str:
        """Say the shape in words and numbers, as in `(hidden_size, 1, conv_kernel) = (768, 1, 4)`."""
        return f"({', '.join(axis_names[axis] for axis in self.axes)}) = {self.shape(sizes)}"


@dataclass(frozen=True)
class TensorName:
    """One tensor in the official PyTorch layout, in ours, and in the official JAX layout; `when` says if it exists."""

    official: str
    ours: str = ""  # where it differs from the official
    jax: str = ""
    when: str = ""  # an option of the configuration, or "not" an option, or the kind of inner model

    def places(self, official: str, ours: str, jax: str) -> dict[str, StoredTensor]:
        """Return the three places under the given prefixes."""
        specs = {"official": self.official, "ours": self.ours or self.official, "jax": self.jax}
        prefixes = {"official": official, "ours": ours, "jax": jax}
        split = ((layout, *spec.split(": ")) for layout, spec in specs.items())
        return {layout: StoredTensor(prefixes[layout] + name, tuple(axes.split())) for layout, name, axes in split}


axis_names = {
    "V": "vocab_size", "d": "hidden_size", "c": "hidden_size", "m": "intermediate_size", "H": "num_attention_heads",
    "f": "head_dim", "h": "4 head_dim", "b": "mini_batch_size", "n": "conv_kernel", "1": "1",
}  # fmt: skip
# Prefixes of the three layouts ({i}: the layer), and the tensors under them.
names = (
    (
        ("", "", ""),
        (
            TensorName("model.embed_tokens.weight: V d", jax="model/wte/embedding: V d"),
            TensorName("lm_head.weight: V d", jax="lm_head/kernel: d V"),
            TensorName("model.norm.weight: d", jax="model/ln_f/kernel: d"),
        ),
    ),
    (
        ("model.layers.{i}.", "model.layers.{i}.", "model/h/{i}/"),
        (
            TensorName("seq_norm.weight: d", jax="seq_norm/kernel: d"),
            TensorName("ffn_norm.weight: d", jax="ffn_norm/kernel: d"),
            TensorName("mlp.gate_proj.weight: m d", jax="feed_forward/w1/kernel: d m"),
            TensorName("mlp.up_proj.weight: m d", jax="feed_forward/w3/kernel: d m"),
            TensorName("mlp.down_proj.weight: d m", jax="feed_forward/w2/kernel: m d"),
            TensorName("conv.norm.weight: d", jax="conv/conv_norm/kernel: d", when="pre_conv"),
            TensorName("conv.conv.weight: d 1 n", jax="conv/conv1/kernel: n 1 d", when="pre_conv"),
            TensorName("conv.conv.bias: d", jax="conv/conv1/bias: d", when="pre_conv"),
        ),
    ),
    (
        ("model.layers.{i}.seq_modeling_block.", "model.layers.{i}.mixer.", "model/h/{i}/seq_modeling_block/"),
        (
            TensorName("learnable_token_idx: b", "offset: b", "learnable_token_idx: b"),
            TensorName("learnable_ttt_lr_weight: H 1 d", "rate_weight: H d", "learnable_ttt_lr/kernel: H d 1"),
            TensorName("learnable_ttt_lr_bias: H 1", "rate_bias: H", "learnable_ttt_lr/bias: H 1"),
            TensorName("ttt_norm_weight: H f", "initial_norm_weight: H f", "ttt_norm/scale: H f"),
            TensorName("ttt_norm_bias: H f", "initial_norm_bias: H f", "ttt_norm/bias: H f"),
            TensorName("W1: H f f", "initial_inner_W1: H f f", "ttt_dense_0: H f f", when="linear"),
            TensorName("b1: H 1 f", "initial_inner_b1: H f", "ttt_bias_0: H 1 f", when="linear"),
            TensorName("W1: H f h", "initial_inner_W1: H f h", "ttt_dense_0: H f h", when="mlp"),
            TensorName("b1: H 1 h", "initial_inner_b1: H h", "ttt_bias_0: H 1 h", when="mlp"),
            TensorName("W2: H h f", "initial_inner_W2: H h f", "ttt_dense_1: H h f", when="mlp"),
            TensorName("b2: H 1 f", "initial_inner_b2: H f", "ttt_bias_1: H 1 f", when="mlp"),
            TensorName("q_proj.weight: c d", jax="wq/kernel: d c"),
            TensorName("k_proj.weight: c d", jax="wk/kernel: d c", when="not share_qk"),
            TensorName("v_proj.weight: c d", jax="wv/kernel: d c"),
            TensorName("o_proj.weight: d c", jax="wo/kernel: c d"),
            TensorName("conv_q.weight: c 1 n", jax="conv_q/kernel: n 1 c", when="share_qk"),
            TensorName("conv_q.bias: c", jax="conv_q/bias: c", when="share_qk"),
            TensorName("conv_k.weight: c 1 n", jax="conv_k/kernel: n 1 c", when="share_qk"),
            TensorName("conv_k.bias: c", jax="conv_k/bias: c", when="share_qk"),
            TensorName("g_proj.weight: c d", jax="wg/kernel: d c", when="use_gate"),
            TensorName("post_norm.weight: c", jax="post_norm/scale: c"),
            TensorName("post_norm.bias: c", jax="post_norm/bias: c"),
        ),
    ),
)
Layout = Literal["official", "dualform", "jax", "kernels"]
# What only the names of that layout hold, and how to load it; the official layout holds none of these.
marks: dict[str, tuple[Layout, str]] = {
    "learnable_token_idx_bias": ("kernels", "Pass *from_kernels(state_dict, config)."),
    "model/": ("jax", "Pass *from_jax(params, config)."),
    ".mixer.": ("dualform", "Use DualformForCausalLM.from_pretrained, or load_state_dict."),
}
# What shapes a checkpoint, for messages.
_shaping = ("ttt_layer_type", "num_hidden_layers", "use_gate", "share_qk", "pre_conv", "tie_word_embeddings")


def load_official(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> DualformForCausalLM:
    """Build our model from a state dict and a configuration of ttt-lm-pytorch; the numbers are theirs.

    Absent keys of the configuration mean the official defaults: `ttt_base_lr` 1.0 for both kinds of inner model,
    `tie_word_embeddings` True, the sizes of the 1b model. `lm_head.weight` may be absent where it is tied.
    Fields that change no number (`use_cache`, `scan_checkpoint_group_size`, ...) are not taken over.
    Shape:  as the official ones (`dualform.models.official.names` is the table).
    Dtype:  parameters take the state dict's one dtype; tensors are copied.
    Raises: CheckpointError for missing and extra keys, wrong shapes, more than one dtype, a configuration of another
            model, a value that the official code does not know; ValueError for sizes that do not fit.
    Source: ttt-lm-pytorch, July 2024. Differs: nothing in value; see "Coming from ttt-lm-pytorch" for its faults.
    Example:
        >>> import dualform as df
        >>> sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
        >>> state_dict, config = df.models.to_official(
        ...     df.DualformForCausalLM(df.DualformConfig(preset="ttt-linear-125m", num_attention_heads=2, **sizes))
        ... )
        >>> config["ttt_layer_type"], sorted(state_dict)[0]
        ('linear', 'lm_head.weight')
        >>> df.models.load_official(state_dict, config).config.chunk
        16
    """
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(
            f"load_official: state_dict is a {type(state_dict).__name__}; expected a mapping of names to tensors. Pass "
            "model.state_dict(), or read a folder with read_folder."
        )
    if (layout := layout_of(state_dict)) != "official":
        advice = next(advice for name, advice in marks.values() if name == layout)
        raise CheckpointError(
            f"load_official: state_dict has the names of the layout {layout!r}; expected those of ttt-lm-pytorch. "
            f"{advice}"
        )
    ours = read_config(config)
    return assemble(ours, rename("load_official", state_dict, ours, "official", "ours"))


def assemble(config: DualformConfig, tensors: Mapping[str, Tensor]) -> DualformForCausalLM:
    """Build a model of copies of these tensors, which are all of its parameters."""
    with torch.device("meta"):  # shapes only: nothing is drawn that would be overwritten
        model = DualformForCausalLM(config)
    model.load_state_dict({name: x.clone() for name, x in tensors.items()}, strict=False, assign=True)
    model.tie_weights()
    anchor = model.model.embed_tokens.weight
    for layer in model.modules():
        if isinstance(layer, TestTimeTraining):
            layer.rate_scale = anchor.new_ones(())
    return model.eval()


def layout_of(tensors: Mapping[str, Any]) -> Layout:
    """Return the layout that a checkpoint's names belong to."""
    if any(isinstance(x, Mapping) for x in tensors.values()):
        return "jax"  # a nested mapping
    for mark, (layout, _) in marks.items():
        if any(mark in name for name in tensors):
            return layout
    return "official"


def to_official(
    model: DualformForCausalLM, *, read: Callable[[Tensor], Tensor | None] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a model's weights and configuration as ttt-lm-pytorch names and shapes them.

    `read` takes something else of each parameter: `lambda p: p.grad` gives gradients; where None, it is left out.
    Shape:  the official ones.
    Dtype:  the model's. Tensors share the model's memory; a tied `lm_head.weight` is a copy.
    Raises: CheckpointError, naming the field, for what the official models cannot express.
    Source: ttt-lm-pytorch, July 2024. Differs: `rate_scale`, the multiplier of a warm-up, has no place there.
    Example:
        >>> import dualform as df
        >>> state_dict, config = df.models.to_official(df.DualformForCausalLM(df.DualformConfig(preset="tiny-ttt-mlp")))
        >>> state_dict["model.layers.0.seq_modeling_block.b1"].shape, config["mini_batch_size"], config["ttt_base_lr"]
        (torch.Size([4, 1, 128]), 16, 1.0)
    """
    if not isinstance(model, DualformForCausalLM):
        raise CheckpointError(
            f"to_official: model is a {type(model).__name__}; expected a DualformForCausalLM. Pass the causal LM "
            "itself (of a wrapped model, what it wraps)."
        )
    fields, sizes = write_config(model.config), axis_sizes(model.config)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    found: dict[str, Tensor] = {}
    for places in tensor_places(model.config):
        parameter = model.get_parameter(places["ours"].name)
        value = parameter.detach() if read is None else read(parameter)
        if value is not None:
            value = value.clone() if tied and places["official"].name == "lm_head.weight" else value
            found[places["official"].name] = move(value, places["ours"], places["official"], sizes)
    return found, fields


def official_names(config: DualformConfig) -> dict[str, str]:
    """Return our parameter's name for every official one.

    Shape:  shapes differ by axes of one only.
    Raises: CheckpointError, naming the field, for what the official models cannot express.
    Source: ttt-lm-pytorch, July 2024.
    Example:
        >>> import dualform as df
        >>> official_names(df.DualformConfig(preset="ttt-mlp-125m"))["model.layers.0.seq_modeling_block.W1"]
        'model.layers.0.mixer.initial_inner_W1'
    """
    return {places["official"].name: places["ours"].name for places in tensor_places(config)}


def axis_sizes(config: DualformConfig) -> dict[str, int]:
    """Return how long each axis is."""
    return {
        "V": config.vocab_size, "d": config.hidden_size, "c": config.hidden_size, "m": config.intermediate_size,
        "H": config.num_attention_heads, "f": config.head_dim, "h": 4 * config.head_dim, "b": config.chunk,
        "n": config.conv_kernel, "1": 1,
    }  # fmt: skip


def tensor_places(config: DualformConfig) -> Iterator[dict[str, StoredTensor]]:
    """Yield every tensor of a model as its places in the layouts."""
    kind = kind_of(config)
    options = {name: bool(getattr(config, name)) for name in ("use_gate", "share_qk", "pre_conv")}
    present = {
        "": True, **{k: k == kind for k in kinds}, **options, **{f"not {n}": not on for n, on in options.items()},
    }  # fmt: skip
    for prefixes, rows in names:
        for i in range(config.num_hidden_layers) if "{i}" in prefixes[0] else (0,):
            for row in rows:
                if present[row.when]:
                    yield row.places(*(prefix.format(i=i) for prefix in prefixes))


def move(x: Tensor, source: StoredTensor, target: StoredTensor, sizes: Mapping[str, int]) -> Tensor:
    """Return x, which lies as in `source`, as it lies in `target`."""
    kept, wanted = ([axis for axis in place.axes if axis != "1"] for place in (source, target))
    x = x.reshape([sizes[axis] for axis in kept])
    x = x if kept == wanted else x.permute([kept.index(axis) for axis in wanted])
    return x.reshape(target.shape(sizes)).contiguous()


def rename(
    function: str, tensors: Mapping[str, Tensor], config: DualformConfig, source: str, target: str
) -> dict[str, Tensor]:
    """Check a whole checkpoint in one layout and return it in another."""
    table, sizes = {p[source].name: p for p in tensor_places(config)}, axis_sizes(config)
    called = {p["official"].name: name for name, p in table.items()}
    head, embedding = called["lm_head.weight"], called["model.embed_tokens.weight"]
    if config.tie_word_embeddings and head not in tensors:
        del table[head]
    _check_keys(function, tensors, {name: p[source] for name, p in table.items()}, config)
    for name, places in table.items():
        x, place = tensors[name], places[source]
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.is_meta:
            what, advice = f"type {type(x).__name__}", "Convert it: torch.as_tensor(x)"
            if isinstance(x, Tensor):
                what, advice = f"dtype {x.dtype}", "Convert it: x.float(), if these are its numbers"
                what, advice = ("no numbers, device meta", "Load the weights first") if x.is_meta else (what, advice)
            raise CheckpointError(
                f"{function}: {name} has {what}; expected a tensor of floating point numbers, {place.describe(sizes)}. "
                f"{advice}."
            )
    wrong = [
        f"{name} has shape {tuple(tensors[name].shape)}; expected {p[source].describe(sizes)}"
        for name, p in table.items()
        if tuple(tensors[name].shape) != p[source].shape(sizes)
    ]
    if wrong:
        raise CheckpointError(f"{function}: {_some(wrong)}. Check the config, or the file.")
    _check_dtypes(function, {name: tensors[name] for name in table})
    if head in table and config.tie_word_embeddings:
        embedded = move(tensors[embedding], table[embedding][source], table[head][source], sizes)
        if not torch.equal(tensors[head], embedded):
            raise CheckpointError(
                f"{function}: {head} differs from {embedding}; expected the same numbers, as tie_word_embeddings = "
                "True. Pass tie_word_embeddings=False in the config to keep both."
            )
    return {p[target].name: move(tensors[name], p[source], p[target], sizes) for name, p in table.items()}


def _check_keys(
    function: str, tensors: Mapping[str, Any], table: Mapping[str, StoredTensor], config: DualformConfig
) -> None:
    sizes = axis_sizes(config)
    missing = [f"{name} {place.shape(sizes)}" for name, place in table.items() if name not in tensors]
    extra = [f"{name} {tuple(getattr(x, 'shape', ()))}" for name, x in tensors.items() if name not in table]
    if not missing and not extra:
        return
    found = [f"lacks {_some(missing)}"] if missing else []
    found += [f"holds {_some(extra)}, which no tensor of that model is called"] if extra else []
    wrappers = {name.removesuffix(known) for name in tensors for known in table if name.endswith("." + known)}
    advice = "Check the config, or the file."
    if missing and len(wrappers) == 1:  # DistributedDataParallel's or torch.compile's
        advice = f"Take the wrapper {wrappers.pop()!r} from the names: name.removeprefix(...)."
    fields = write_config(config)
    options = ", ".join(f"{name} = {fields[name]!r}" for name in _shaping)
    raise CheckpointError(
        f"{function}: state_dict {' and '.join(found)}; expected the {len(table)} tensors of a model with {options}. "
        f"{advice}"
    )


def _check_dtypes(function: str, tensors: Mapping[str, Tensor]) -> None:
    by_dtype: dict[torch.dtype, list[str]] = {}
    for name, x in tensors.items():
        by_dtype.setdefault(x.dtype, []).append(name)
    if len(by_dtype) > 1:
        common = max(by_dtype, key=lambda dtype: len(by_dtype[dtype]))
        odd = [f"{name} ({x.dtype})" for name, x in tensors.items() if x.dtype != common]
        raise CheckpointError(
            f"{function}: state_dict mixes dtypes: {_some(odd)}; expected {common}, as the other "
            f"{len(by_dtype[common])} tensors. Cast them: {{name: x.to({common}) for name, x in state_dict.items()}}."
        )


def _some(items: list[str], at_most: int = 24) -> str:
    rest = len(items) - at_most
    return ", ".join(items[:at_most]) + (f" and {rest} more" if rest > 0 else "")
