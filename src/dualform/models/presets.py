"""Named configurations: what each preset sets, as plain values.

The published sizes are those of Sun et al. 2024 (appendix, table 3) with their inner learning rates, 1.0 for TTT-Linear
and 0.1 for TTT-MLP. The tiny ones are for bytes and two CPU cores.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dualform.catalogue import Catalogue

presets = Catalogue("presets")
Fields = dict[str, Any]

# size: (hidden_size, intermediate_size, num_hidden_layers, num_attention_heads)
published = {
    "125m": (768, 2048, 12, 12),
    "350m": (1024, 2736, 24, 16),
    "760m": (1536, 4096, 24, 16),
    "1b": (2048, 5504, 24, 32),
}
inner: dict[str, Fields] = {
    "linear": {
        "learner": {"name": "residual_norm", "spec": {"name": "Linear"}},
        "rule": {"name": "SGD", "lr": 1.0, "averaged": True},
    },
    "mlp": {
        "learner": {"name": "residual_norm", "spec": {"name": "MLP", "depth": 2, "expand": 4}},
        "rule": {"name": "SGD", "lr": 0.1, "averaged": True},
    },
    "attention": {"layer_types": ["full_attention"]},
}
backbones: dict[str, Fields] = {
    "": {"use_gate": False, "share_qk": False, "pre_conv": False},
    "-mamba": {"use_gate": True, "share_qk": True, "pre_conv": True},
}
# Bytes: three special tokens (pad, begin, end), then the 256 values.
byte_vocabulary: Fields = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
tiny = (128, 344, 2, 4)
# Narrow layers give small keys: with the published inner rates they would hardly learn at test time (LAB.md).
tiny_changes: dict[str, Fields] = {
    "linear": {"pre_conv": True, "rule": {"name": "SGD", "lr": 3.0, "averaged": True}},
    "mlp": {"pre_conv": True, "rule": {"name": "SGD", "lr": 1.0, "averaged": True}},
    "attention": {"pre_conv": True},
}


def _sizes(sizes: tuple[int, int, int, int]) -> Fields:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, sizes, strict=True))


def _preset(name: str, formula: str, fields: Fields) -> None:
    def build() -> Mapping[str, Any]:
        return MappingProxyType(dict(fields))

    build.__doc__ = f"Return the fields of the preset {name}."
    source = "this project" if name.startswith("tiny") else "Sun et al. 2024, table 3"
    presets.record(name=name, formula=formula, source=source)(build)


for _kind, _fields in inner.items():
    _label = f"tiny-{_kind}" if _kind == "attention" else f"tiny-ttt-{_kind}"
    _preset(_label, f"{_kind}, bytes", _sizes(tiny) | byte_vocabulary | _fields | tiny_changes[_kind])
for _size, _shape in published.items():
    for _kind, _fields in inner.items():
        for _suffix, _backbone in backbones.items() if _kind != "attention" else [("", {})]:
            _label = f"ttt-{_kind}" if _kind != "attention" else "attention"
            _formula = f"{_kind}, {'Mamba' if _suffix else 'Transformer'} backbone"
            _preset(f"{_label}-{_size}{_suffix}", _formula, _sizes(_shape) | _fields | _backbone)
