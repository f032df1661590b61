"""Language models on Hugging Face transformers; importing this registers their Auto classes."""

from dualform.models.causal_lm import DualformForCausalLM, DualformModel
from dualform.models.configuration import DualformConfig
from dualform.models.presets import presets

__all__ = ["DualformConfig", "DualformForCausalLM", "DualformModel", "presets"]
