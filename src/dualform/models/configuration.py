"""What a model is: a strict configuration whose learner, objective and rule are JSON values."""

# No `from __future__ import annotations` here: @strict does not check the type of a field whose annotation is a string.
import difflib
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, configuration_utils
from transformers.utils.hub import cached_file

from dualform import bundles
from dualform.catalogue import expect, near_misses
from dualform.learning.learners import learners
from dualform.learning.objectives import objectives
from dualform.learning.rules import rules
from dualform.learning.templates import recipe_of
from dualform.models.presets import inner, presets
from dualform.own_code import codes_in, expect_no_paths, unsaved
from dualform.shapes import require

layer_kinds = ("test_time", "full_attention", "sliding_attention")
specs = {"learner": learners, "objective": objectives, "rule": rules}
# What transformers' fields hold here, and what may stand beside fields: names that other readers of a config.json know.
Dtype, Named = str | torch.dtype | None, str | dict[str, Any] | None
shared: dict[str, Any] = {
    "transformers_version": str | None, "architectures": list[str] | None, "output_hidden_states": bool | None,
    "return_dict": bool | None, "dtype": Dtype, "torch_dtype": Dtype, "chunk_size_feed_forward": Annotated[int, Ge(0)],
    "is_encoder_decoder": bool, "id2label": dict[int, str] | dict[str, str] | None,
    "label2id": dict[str, int] | dict[str, str] | None, "num_labels": Annotated[int, Ge(1)],
    "problem_type": Literal["regression", "single_label_classification", "multi_label_classification"] | None,
    "output_attentions": bool | None, "attn_implementation": Named, "experts_implementation": Named,
    "tokenizer_class": str | None, "name_or_path": Any, "quantization_config": Any, "auto_map": Any, "model_type": str,
    "hidden_act": Literal["silu", "swish"], "max_position_embeddings": Annotated[int, Ge(1)],
}  # fmt: skip
# A resuming Trainer reads config.json with transformers' own class, which must know our kind of layer (as caches do).
for _name in ("ALLOWED_ATTN_LAYER_TYPES", "ALLOWED_LAYER_TYPES"):
    setattr(configuration_utils, _name, (*getattr(configuration_utils, _name, ()), "test_time"))


@strict
class DualformConfig(PreTrainedConfig):
    """Describe a causal language model whose layers learn while they read.

    Any field of a preset can be overridden; `layer_types` (one kind per layer, or a single kind for all) is derived
    after the overrides. A spec left out is that of TTT-MLP. `learner`, `objective` and `rule` may be code of one's own:
    a class or function, or its file, "mine.py:Mine", which is saved with the model (docs/your_code.md).
    Shape:  head_dim = hidden_size / num_attention_heads, which must divide, and be even (RoPE turns pairs).
    Raises: CatalogueError for an unknown preset, learner, objective, rule or option of these; ValueError for sizes
            that do not fit, values of another type, kinds and names that are unknown.
    Source: Sun et al. 2024; field names as in their models. Differs: `learner`, `objective`, `rule` are specs.
    Example:
        >>> config = DualformConfig(preset="tiny-ttt-mlp", num_hidden_layers=2)
        >>> config.layer_types, config.rule["lr"]
        (['test_time', 'test_time'], 1.0)
    """

    model_type = "dualform"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    learner: Any = None
    objective: Any = None
    rule: Any = None
    chunk: int = 16
    use_gate: bool = False
    share_qk: bool = False
    pre_conv: bool = False
    conv_kernel: int = 4
    rope_theta: float = 1e4
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None

    def __init__(self, *, preset: str | None = None, **given: Any) -> None:
        # transformers' own init cannot tell a field that was given from one left at its default, and a preset must.
        base = {**inner["mlp"], "objective": {"name": "Squared"}}
        if preset is not None:
            base |= presets.build(preset).build()
        given = _over(base, {name: value for name, value in given.items() if not (name in specs and value is None)})
        defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(self)}
        # What `to_dict` wrote may hold attributes that others gave it.
        _refuse_unknown(given, [*defaults, *shared], near_only="model_type" in given)
        hints = shared | self.__annotations__
        for name in {**defaults, **given}:
            value, hint = given.get(name, defaults.get(name)), hints.get(name, Any)
            advice = f"Its default is {defaults[name]!r}." if name in defaults else "Leave it out."
            expect("DualformConfig", name, value, hint, advice)
            given[name] = float(value) if hint is float else _dtype(name, value) if hint is Dtype else value
        for name in defaults:
            setattr(self, name, given.pop(name))
        self.__post_init__(**given)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read what `to_dict` wrote; refuse another model's, whose fields would silently become defaults here."""
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            advice = "Convert it: `python -m dualform convert FOLDER NEW`" if kind == "ttt" else "Use AutoConfig"
            raise ValueError(f"DualformConfig: model_type is {kind!r}; expected {cls.model_type!r}. {advice}.")
        expect_no_paths("DualformConfig", {name: config_dict[name] for name in specs if name in config_dict})
        if "preset" in kwargs:
            raise ValueError(
                f"DualformConfig: preset is {kwargs['preset']!r} while a configuration is read; expected fields to lay "
                "over it. Make a new one: DualformConfig(preset=...)."
            )
        own = {**shared, **cls.__annotations__}
        _refuse_unknown(kwargs, list(own), near_only=True)  # others may be for who reads a model or a tokenizer
        given = {name: kwargs.pop(name) for name in own if name in kwargs and own[name] is not Dtype}
        given = {name: value for name, value in given.items() if not (name in specs and value is None)}
        kinds = config_dict.get("layer_types") or []
        if "num_hidden_layers" in given and "layer_types" not in given and len(set(kinds)) == 1:
            given["layer_types"] = kinds[:1]  # one kind for all, however many there are now
        return super().from_dict({"model_type": kind, **_over(config_dict, given)}, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: Any) -> Any:
        """Read a file as `from_dict` does: it names no code that may run."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]: whatever else it takes
        cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Read a configuration, and the files of own code that it names; none of them runs before a model is built."""
        gather_code(pretrained_model_name_or_path, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save as transformers does, with the files that the learner, objective and rule are in.

        What has no file is saved by its name alone, with a warning that says how to load it.
        """
        own = {name: getattr(self, name) for name in specs}
        for _, code in codes_in(own):
            bundles.write(code, Path(save_directory))
        if lost := unsaved(own):
            warnings.warn(
                f"save_pretrained: the source of {'; '.join(lost)} is not saved; expected a class in a file of its "
                "own. "
                "Move it to one, say mine.py, import it from there and save again: config.learner = 'mine.py:NAME' is "
                "enough. "
                "As it is, load with from_pretrained(folder, learner=NAME), "
                "and likewise objective= and rule=.",
                stacklevel=2,
            )
        return super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """Leave out the copy of our source: models save a file that imports the package."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Specs are JSON values at any time, so that a configuration can be saved at any time.
        if name in specs and value is not None:
            if name == "learner" and isinstance(value, torch.nn.Module):
                recipe_of(value, self.head_dim)  # raises: it is built already
            value = specs[name].build(value).to_json()
        super().__setattr__(name, value)

    def __post_init__(self, **kwargs: Any) -> None:
        kinds = self.layer_types or ["test_time"]
        self.layer_types = list(kinds) * self.num_hidden_layers if len(kinds) == 1 else list(kinds)
        # Before super's: @strict wraps what the validators raise in an error that is no ValueError.
        self.validate_architecture()
        self.validate_layer_type()
        is_numbered = self.id2label is None or {str(key).isdecimal() for key in self.id2label} == {True}
        advice = "Number the labels."
        require(is_numbered, "DualformConfig", "id2label", self.id2label, "{0: name, ...}", advice, ValueError)
        is_right, advice = not self.is_encoder_decoder, "There is no encoder."
        require(is_right, "DualformConfig", "is_encoder_decoder", True, "False", advice, ValueError)
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def validate_layer_type(self) -> None:
        kinds = self.layer_types or []
        for wrong in set(kinds) - set(layer_kinds):
            raise ValueError(
                f"DualformConfig: layer_types holds {wrong!r}; expected {', '.join(map(repr, layer_kinds))}. "
                "Choose one of these for each layer."
            )
        if len(kinds) != self.num_hidden_layers:
            raise ValueError(
                f"DualformConfig: layer_types has {len(kinds)} entries; expected num_hidden_layers = "
                f"{self.num_hidden_layers}. Give one kind per layer, or one for all."
            )
        needed = "sliding_attention" in kinds
        if (needed and self.sliding_window is None) or (self.sliding_window is not None and self.sliding_window < 1):
            raise ValueError(
                f"DualformConfig: sliding_window is {self.sliding_window}; expected a number of tokens > 0 for "
                "sliding_attention layers. Set sliding_window."
            )

    def validate_architecture(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "chunk")
        ranges = {name: (getattr(self, name) >= 1, "a whole number >= 1") for name in (*sizes, "conv_kernel")}
        ranges |= {n: (getattr(self, n) > 0, "a finite number > 0") for n in ("rope_theta", "rms_norm_eps")}
        ranges["initializer_range"] = self.initializer_range >= 0, "a number >= 0"
        for name, (is_right, expected) in ranges.items():
            require(is_right, "DualformConfig", name, getattr(self, name), expected, "Change it.", ValueError)
        ends = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        for name, held in (("bos_token_id", self.bos_token_id), *(("eos_token_id", end) for end in ends)):
            if held is not None and not 0 <= held < self.vocab_size:
                raise ValueError(
                    f"DualformConfig: {name} is {held}; expected an id of the vocabulary, at most vocab_size - 1 = "
                    f"{self.vocab_size - 1}, or None. Change one of the two."
                )
        if self.pad_token_id is not None and not -self.vocab_size <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"DualformConfig: pad_token_id is {self.pad_token_id}; expected an id of the embedding, at most "
                f"vocab_size - 1 = {self.vocab_size - 1}, or None. Change one of the two."
            )
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"DualformConfig: hidden_size is {self.hidden_size} with num_attention_heads = "
                f"{self.num_attention_heads}; expected an even number of channels per head, a multiple of "
                f"2 * {self.num_attention_heads} = {2 * self.num_attention_heads}. Change one of the two."
            )


def gather_code(place: Any, kwargs: Mapping[str, Any], trusted: bool = False) -> list[str]:
    """Read the files of own code that come with a model; let them run if they are trusted; say what was let.

    Raises: CodeError if a file is missing, or not the one that the configuration names.
    """
    hub = ("revision", "cache_dir", "token", "subfolder", "local_files_only", "force_download", "proxies")
    given = {name: kwargs[name] for name in hub if kwargs.get(name) is not None}
    document, _ = PreTrainedConfig.get_config_dict(place, **given)

    def find(name: str) -> Path | None:
        found = cached_file(place, name, **given, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)

    said = list[str]()
    for name, code in codes_in({name: document.get(name) for name in specs if name not in kwargs}):
        if "" not in code:
            key = bundles.gather(code, find, "from_pretrained")
            if trusted and not bundles.is_allowed(code):
                bundles.allow(key, remember=False)
                said.append(f"{name}: {bundles.described(code)}")
    return said


def _over(preset: Mapping[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Lay what was given over a preset; options without a name, as in rule={"lr": 0.5}, are laid over its spec."""
    merged = dict(preset) | given
    for name, value in given.items():
        below = preset.get(name)
        if isinstance(value, Mapping) and "name" not in value and isinstance(below, Mapping):
            merged[name] = _over(below, dict(value))
    return merged


def _refuse_unknown(given: Mapping[str, Any], known: list[str], near_only: bool) -> None:
    # transformers keeps keywords it does not know as attributes; a typo must not vanish that way.
    for name in given:
        is_near = not near_only or difflib.get_close_matches(name, known, cutoff=0.85)
        if name not in known and name[0] != "_" and is_near:
            raise ValueError(f"DualformConfig: unknown field {name!r}. {near_misses(name, known)}")


def _dtype(name: str, value: Any) -> torch.dtype | None:
    """Return the floating type that a name or a type of torch's is."""
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if value is None or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    advice = near_misses(str(value), ["float16", "bfloat16", "float32", "float64"])
    raise ValueError(f"DualformConfig: {name} is {value!r}; expected a type of real numbers. {advice}")
