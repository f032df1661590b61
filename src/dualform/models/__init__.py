"""Language models on Hugging Face transformers; importing this registers their Auto classes."""

from dualform.models.causal_lm import DualformForCausalLM, DualformModel
from dualform.models.configuration import DualformConfig
from dualform.models.folder import read_folder
from dualform.models.official import load_official, official_names, to_official
from dualform.models.official_config import CheckpointError
from dualform.models.presets import presets
from dualform.models.translate import from_jax, from_kernels, to_jax

__all__ = [
    "CheckpointError",
    "DualformConfig",
    "DualformForCausalLM",
    "DualformModel",
    "from_jax",
    "from_kernels",
    "load_official",
    "official_names",
    "presets",
    "read_folder",
    "to_jax",
    "to_official",
]
