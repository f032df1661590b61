"""Language models on Hugging Face transformers, whose Auto classes importing this registers; scikit-learn estimators.

The estimators (`dualform.models.tabular`) do not need transformers: without it,
only the language models' names are missing, and asking for one says so.
"""

from typing import Never

try:
    from dualform.models.body import DualformModel
    from dualform.models.causal_lm import DualformForCausalLM
    from dualform.models.classifiers import DualformForSequenceClassification, DualformForTokenClassification
    from dualform.models.configuration import DualformConfig
    from dualform.models.folder import read_folder
    from dualform.models.official import load_official, official_names, to_official
    from dualform.models.official_config import CheckpointError
    from dualform.models.presets import presets
    from dualform.models.translate import from_jax, from_kernels, to_jax
except ModuleNotFoundError as error:
    if error.name is None or error.name.startswith("dualform"):
        raise
    _missing = error

    def __getattr__(name: str) -> Never:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        raise ModuleNotFoundError(f'{_missing}; run `pip install "dualform[models]"`.', name=_missing.name)


__all__ = [
    "CheckpointError", "DualformConfig", "DualformForCausalLM", "DualformForSequenceClassification",
    "DualformForTokenClassification", "DualformModel", "from_jax", "from_kernels", "load_official", "official_names",
    "presets", "read_folder", "to_jax", "to_official",
]  # fmt: skip
