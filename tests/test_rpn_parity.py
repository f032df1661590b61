"""tinyBIG 0.2.1's recorded values: equal where its formula is the definition, and warned of where it is wrong."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from dualform.catalogue import CatalogueError, UnknownNameError
from dualform.functions import Expansion, TinybigDefect, expansions, from_tinybig
from dualform.functions.migration import defects
from dualform.testing import agree

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "rpn_functions.json").read_text())
with np.load(DATA / "rpn_functions.npz") as opened:
    ARRAYS = dict(opened)


def array(key):
    return [array(k) for k in key] if isinstance(key, list) else torch.from_numpy(ARRAYS[key])


def loaded(value):
    """Replace arrays in a case's keywords; classes and functions stay the configurations that from_tinybig reads."""
    if isinstance(value, dict):
        return array(value["__array__"]) if "__array__" in value else {k: loaded(v) for k, v in value.items()}
    return [loaded(v) for v in value] if isinstance(value, list) else value


def replayed(case, dtype=torch.float64):
    """Call a case as it was recorded."""
    made = from_tinybig(case["class"], **loaded(case["kwargs"]))
    given = {name: array(key) for name, key in case.get("inputs", {}).items()}
    given = {name: [x.to(dtype) for x in v] if isinstance(v, list) else v.to(dtype) for name, v in given.items()}
    given |= case.get("ints", {})
    if "internals" in case:
        given["constants"] = {name: array(key) for name, key in case["internals"].items()}
    return made(**given)


SOUND = [c for c in CASES if c["class"] not in defects and "outputs" in c]
WRONG = [c for c in CASES if c["class"] in defects]


@pytest.mark.parametrize("case", SOUND, ids=lambda c: c["id"])
@pytest.mark.filterwarnings("ignore:.*ignores with_replacement")
def test_recorded_values(case):
    expected = array(case["outputs"]["out"])
    assert case["dtype"] == "float64"
    got = replayed(case)
    if case["family"] == "remainder" and expected.ndim == 1:
        expected = expected.expand(got.shape)
    got = got if case.get("inputs") else got.double()  # nothing that is given has a dtype
    assert got.dtype == torch.float64
    assert got.shape == expected.shape
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    assert torch.allclose(got, expected, rtol=0, atol=1e-8 * scale)
    if case["family"] != "reconciliation" or "inputs" in case:
        single = replayed(case, torch.float32)
        assert single.dtype == torch.float32
        assert torch.allclose(single.double(), expected, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("case", WRONG, ids=lambda c: c["id"])
def test_defects_are_warned_of_and_only_those(case):
    with pytest.warns(TinybigDefect, match=case["class"]):
        made = from_tinybig(case["class"], **loaded(case["kwargs"]))
    assert defects[case["class"]]
    if case["family"] == "expansion":
        assert made(array(case["inputs"]["x"])).isfinite().all()


def test_every_sound_case_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in SOUND:
            if not case["kwargs"].get("with_replacement"):
                from_tinybig(case["class"], **loaded(case["kwargs"]))


def test_wrong_values_differ_where_they_are_wrong():
    """The defects are real: the recorded numbers are not the documented ones."""
    x = array("in/x_lag")
    (case,) = (c for c in CASES if c["id"] == "expansion/laguerre_expansion[d=2]")
    recorded = array(case["outputs"]["out"])[:, ::2]
    agree("tinyBIG's P_1", recorded, x + 2)
    agree("the right P_1", expansions.laguerre()(x)[:, ::2], 2 - x)
    (case,) = (c for c in CASES if c["id"] == "expansion/meyer_wavelet_expansion[d=1,s=2,t=2,a=2]")
    scaling = expansions.meyer_wavelet(part="scaling", dilation=2.0, scales=2, shifts=2)
    agree("tinyBIG's Meyer wavelet is the scaling function", array(case["outputs"]["out"]), scaling(array("in/x")))


# -- calling conventions and keywords ----------------------------------------------------------------------------------


def test_calling_conventions():
    x = torch.randn(5, 4, dtype=torch.float64)
    kappa = from_tinybig("tinybig.expansion.taylor_expansion", d=3, name="mine", device="cpu")
    assert kappa.calculate_D(4) == kappa.calculate_D(m=4) == kappa.dim(4) == 84
    agree("forward", kappa.forward(x, device="cpu"), kappa(x))
    psi = from_tinybig("lorr_reconciliation", r=1)
    w = torch.randn(1, psi.calculate_l(n=2, D=3), dtype=torch.float64)
    agree("order", psi.forward(2, 3, w), psi(n=2, D=3, w=w[0]))
    agree("ours", psi(w[0], 2, 3), psi.record(w[0], 2, 3))
    pi = from_tinybig("linear_remainder", activation_functions=[torch.nn.SiLU(), "tanh"], enable_bias=True)
    W, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    expected = torch.tanh(torch.nn.functional.silu(x @ W.T + b))
    agree("keywords", pi(x=x, w=W, b=b, m=4, n=3), expected)
    agree("forward", pi.forward(x, W, b), expected)
    agree("flat", pi(x, 3, W.reshape(1, -1), b), expected)
    assert pi.calculate_l(n=3, D=4) == 12
    fuse = from_tinybig("lowrank_parameterized_concatenation_fusion", dims=[4, 4], n=3, r=1)
    assert (fuse.calculate_n(), fuse.calculate_l(), fuse.calculate_n([2, 2])) == (3, 11, 3)
    assert fuse([x, x], torch.randn(1, 11, dtype=torch.float64)).shape == (5, 3)
    with pytest.raises(CatalogueError, match="dims is None"):
        from_tinybig("sum_fusion").calculate_l()


def test_process_functions_go_around():
    x = torch.randn(5, 4, dtype=torch.float64)
    made = from_tinybig(
        "taylor_expansion", preprocess_functions="torch.nn.functional.tanh", postprocess_functions=[torch.exp]
    )
    agree("around", made(x), expansions.taylor()(x.tanh()).exp())
    inner = {"__class__": "expansion.taylor_expansion", "kwargs": {"preprocess_functions": "sigmoid"}}
    outer = from_tinybig("extended_expansion", composition_functions=[inner, "identity", made, expansions.haar()])
    expected = [expansions.taylor()(x.sigmoid()), x, made(x), expansions.haar()(x)]
    agree("inside a composition", outer(x), torch.cat(expected, -1))
    assert isinstance(outer.record, Expansion)
    configured = from_tinybig(
        "nested_expansion",
        composition_function_configs=[
            {"function_class": "tinybig.expansion.bspline_expansion", "function_parameters": {"t": 2}}
        ],
    )
    agree("a configuration", configured(x), expansions.bspline(cells=2)(x))
    with pytest.raises(CatalogueError, match="'dropout' is not a function of x alone"):
        from_tinybig("identity_expansion", preprocess_functions="dropout")
    with pytest.raises(CatalogueError, match="is no function"):
        from_tinybig("identity_expansion", preprocess_functions=3)


@pytest.mark.parametrize("radius", [1, 2])
@pytest.mark.parametrize(("packing", "step"), [("complete_hexagonal", (1.5, 3**0.5, 2)), ("sparse_square", (2, 2, 2))])
def test_packings_are_strides(radius, packing, step):
    kwargs = {"h": 5, "w": 6, "d": 2, "p_r": radius, "p_d": 1, "packing_strategy": packing}
    made = from_tinybig("cylinder_patch_based_geometric_expansion", **kwargs)
    sizes = (radius, radius, 1)
    assert made.record.options["stride"] == tuple(max(1, int(s * p)) for s, p in zip(step, sizes, strict=True))
    assert made(torch.randn(2, 60)).shape == (2, made.calculate_D(60))


class Grid:
    h, w, d, universe_num = 3, 4, 1, 2


class Ball:
    p_r = 1


def test_geometry_objects_are_read():
    x = torch.randn(2, 24, dtype=torch.float64)
    got = from_tinybig("geometric_expansion", grid=Grid(), patch=Ball(), cd_h=1, cd_w=2, cd_d=1)(x)
    agree("geometry", got, expansions.sphere_patch(grid=(3, 4), channels=2, stride=(1, 2, 1))(x))


@pytest.mark.parametrize(
    ("name", "kwargs", "says"),
    [
        ("taylr_expansion", {}, "'taylor_expansion'"),
        ("gcn", {}, "wait for a later issue"),
        ("chain_interdependence", {}, "wait for a later issue"),
        ("bspline_expansion", {"grid_size": 50}, "unknown keyword 'grid_size'.*'grid_range'"),
        ("geometric_expansion", {"h": 3, "w": 3}, "grid or patch is missing"),
        ("sphere_patch_based_geometric_expansion", {"h": 3, "w": 3, "p_r": 1, "packing_strategy": "dense"}, "'dense'"),
        ("metric_fusion", {"metric": "mode"}, "metric is 'mode'"),
        (3, {}, "name is 3; expected the name of a class"),
    ],
)
def test_what_does_not_exist_is_refused(name, kwargs, says):
    with pytest.raises((CatalogueError, UnknownNameError, ValueError), match=says):
        from_tinybig(name, **kwargs)
