"""The official configuration's fields, what their absence means, and ours for them, both ways."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dualform.catalogue import near_misses
from dualform.learning.learners import learners
from dualform.learning.objectives import objectives
from dualform.learning.rules import rules
from dualform.models.configuration import DualformConfig
from dualform.models.presets import inner


class CheckpointError(ValueError):
    """A checkpoint, or its configuration, that is not what it should be."""


# The fields of the official configuration and what their absence means: those that mean the same in ours,
_shared: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24,
    "num_attention_heads": 32, "mini_batch_size": 16, "use_gate": False, "share_qk": False, "pre_conv": False,
    "conv_kernel": 4, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
_renamed = {"mini_batch_size": "chunk"}
# those that say what learns, and how fast,
_learning: dict[str, Any] = {"ttt_layer_type": "linear", "ttt_base_lr": 1.0}
# and those that change no number.
_idle: dict[str, Any] = {
    "hidden_act": "silu", "max_position_embeddings": 2048, "pretraining_tp": 1, "scan_checkpoint_group_size": 0,
    "use_cache": False,
}  # fmt: skip
official_defaults: Mapping[str, Any] = MappingProxyType({**_shared, **_learning, **_idle})
kinds = ("linear", "mlp")


def read_config(config: Mapping[str, Any]) -> DualformConfig:
    """Return our configuration for an official one; absent keys mean the official defaults."""
    if not isinstance(config, Mapping):
        raise CheckpointError(
            f"load_official: config is a {type(config).__name__}; expected a mapping of fields. Pass config.to_dict()."
        )
    model_type = config.get("model_type", "ttt")
    if model_type != "ttt":
        ours = model_type == "dualform"
        advice = "Use from_pretrained." if ours else "Pass the configuration of an official TTT model."
        raise CheckpointError(f"load_official: model_type is {model_type!r}; expected 'ttt'. {advice}")
    for name in config.keys() - official_defaults.keys():
        # Anything else is transformers' business; a typo would silently mean a default.
        if close := difflib.get_close_matches(name, official_defaults, n=2, cutoff=0.85):
            raise CheckpointError(
                f"load_official: config has no field {name!r}. Did you mean {' or '.join(map(repr, close))}?"
            )
    given = {name: config.get(name, default) for name, default in official_defaults.items()}
    for name, value in given.items():
        wanted = _types(official_defaults[name], name)
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            types = " or ".join(kind.__name__ for kind in wanted)
            raise CheckpointError(
                f"load_official: {name} is {value!r}; expected a value of type {types}, as in {name} = "
                f"{official_defaults[name]!r}. Correct the config."
            )
    kind = given["ttt_layer_type"]
    if kind not in kinds:
        raise CheckpointError(
            f"load_official: ttt_layer_type is {kind!r}; expected one of {', '.join(map(repr, kinds))}. "
            f"{near_misses(str(kind), list(kinds))}"
        )
    if given["hidden_act"] not in ("silu", "swish"):
        raise CheckpointError(
            f"load_official: hidden_act is {given['hidden_act']!r}; expected 'silu', the only one that was trained. "
            "Build the model with DualformConfig and layers of your own."
        )
    shared = {_renamed.get(name, name): given[name] for name in _shared}
    return DualformConfig(**shared, **_inner_fields(kind, given["ttt_base_lr"]))


def _types(default: Any, name: str) -> tuple[type, ...]:
    if name.endswith("_token_id"):
        return (int, list, type(None)) if name == "eos_token_id" else (int, type(None))
    return (float, int) if isinstance(default, float) else (type(default),)


def write_config(config: DualformConfig) -> dict[str, Any]:
    """Return the official configuration for ours, or say which field it cannot express."""
    kind = kind_of(config)
    shared = {name: getattr(config, _renamed.get(name, name)) for name in _shared}
    return {"model_type": "ttt", **shared, "ttt_layer_type": kind, "ttt_base_lr": config.rule["lr"], **_idle}


def kind_of(config: DualformConfig) -> str:
    """Return the official kind of inner model, "linear" or "mlp"."""
    layers = sorted(set(config.layer_types or ()) - {"test_time"})
    if layers:
        raise CheckpointError(
            f"to_official: layer_types holds {layers}; expected 'test_time' for all {config.num_hidden_layers} layers. "
            "The official models know no other: save_pretrained keeps them."
        )
    asked = {"learner": learners, "objective": objectives, "rule": rules}
    built = {name: catalogue.build(getattr(config, name)) for name, catalogue in asked.items()}
    options = [_inner_fields(kind, config.rule.get("lr", 1.0)) for kind in kinds]
    for name, catalogue in asked.items():
        possible = [catalogue.build(fields[name]) for fields in options]
        if built[name] not in possible:
            expected = " or ".join(dict.fromkeys(map(repr, possible)))
            raise CheckpointError(
                f"to_official: {name} is {built[name]!r}; expected {expected}. The official models know no other: "
                "save_pretrained keeps it."
            )
    return kinds[[learners.build(fields["learner"]) for fields in options].index(built["learner"])]


def _inner_fields(kind: str, rate: float) -> dict[str, Any]:
    """Return learner, objective and rule of an official kind."""
    fields = inner[kind]
    return {**fields, "rule": {**fields["rule"], "lr": rate}, "objective": {"name": "Squared"}}
