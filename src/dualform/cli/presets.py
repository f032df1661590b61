"""`dualform presets`: the named configurations."""

from __future__ import annotations

import json

from dualform.cli.output import AsJson, show
from dualform.models import DualformConfig, presets


def list_presets(name: str | None = None, /, *, as_json: AsJson = False) -> None:
    """List the presets, or show one preset's configuration.

    Args:
        name: The preset to show in full.
        as_json: Print JSON instead of a table.
    """
    if name is not None:
        fields = DualformConfig(preset=name).to_diff_dict()
        if as_json:
            print(json.dumps(fields, indent=2))
        else:
            show([{"field": key, "value": json.dumps(value)} for key, value in fields.items()])
        return
    rows = [{"name": key} | _summary(DualformConfig(preset=key)) for key in presets]
    show(rows, as_json=as_json)


def _summary(config: DualformConfig) -> dict[str, object]:
    assert config.layer_types is not None
    learner = config.learner.get("spec", config.learner)["name"] if "test_time" in config.layer_types else "-"
    return {
        "learner": learner, "hidden": config.hidden_size, "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads, "chunk": config.chunk, "vocabulary": config.vocab_size,
        "backbone": "Mamba" if config.use_gate else "Transformer",
    }  # fmt: skip
