"""Modules that moved are found by their old names too, which pickles and code of before say."""

import importlib
import sys

# Below `dualform.`: the folder of before, then old name or old>new in each folder of now.
_MOVES = {
    "calculus": {
        "algebra": (
            "terms relations compose contract collapse>sums place>materialise canonical>normal_form "
            "structure>linear_map queries questions>proofs notation indices>index_products picture>drawing "
            "export>scipy axes>axis_names"
        ),
        "ops": (
            "table examples rows_attention>attention rows_fourier>fourier rows_index>indexing "
            "rows_linalg>linalg rows_norms>norms rows_pointwise>pointwise rows_products>products "
            "rows_reductions>reductions rows_views>views rows_windows>windows spelled"
        ),
        "graphs": (
            "trace functional>functionalize normal>single_results pairs>complex_pairs definitions "
            "rules>local_rules program>local_derivatives fingerprint rewriting identities "
            "linear>straight_line recorder twin casts custom kept rows_kept>kept_derivative"
        ),
        "explanations": (
            "story>account chain>chain_rule elimination>deltas wording explain>explanation page>html code>torch_code "
            "composition reference>op_table"
        ),
        "calculus": "slips>mistakes sites>per_sample",
    },
    "explanations": {"explanations": "explain>explanation"},
    "functions": {"functions": "blocks>in_blocks products>attribute_products"},
    "learning": {
        "graphs": "fission>split norms>whole_norms regroup simplify",
        "learning": "pieces>flat_leaves scan>op",
        "ops": "lookups",
    },
    "graphs": {"ops": "spelled"},
    "kernels": {"ops": "picking"},
}


def moved_modules() -> dict[str, str]:
    """Old name of each module that moved -> its name now."""
    found = {}
    for source, folders in _MOVES.items():
        for folder, names in folders.items():
            for name in names.split():
                old, _, new = name.partition(">")
                found[f"dualform.{source}.{old}"] = f"dualform.{folder}.{new or old}"
    return found


for _old, _new in moved_modules().items():
    sys.modules.setdefault(_old, importlib.import_module(_new))
