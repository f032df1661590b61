"""Laws of the one table: every row is exact on its examples at any sizes, and its claims of affinity are true.

A row carries its examples, so a new op is tested by existing. Derivatives are compared with torch.func.jacrev, one
cotangent at a time: the batching rules of some of torch's backwards are wrong (cdist, native_layer_norm).
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dualform.algebra.linear_map import Derivative
from dualform.explanations.op_table import op_table
from dualform.graphs import local_rules
from dualform.graphs.local_rules import affine, derivative
from dualform.ops.examples import SIZES, Example
from dualform.ops.table import EACH, ROWS, OpCall, Row, add_row, find_row, row
from dualform.shapes import TraceError

aten = torch.ops.aten
TIGHT = {"rtol": 1e-10, "atol": 1e-10, "equal_nan": True}
CASES = [
    pytest.param(example, id=f"{name.removeprefix('aten::')}-{k}")
    for name, row in sorted(ROWS.items())
    for k, example in enumerate(row.examples)
]
EXAMPLES = [case.values[0] for case in CASES]


@pytest.fixture(autouse=True)
def ignore_deprecated() -> Any:
    """Rows of old spellings are rows too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(deprecated|is not supported|will be removed).*")
        yield


def make_call(example: Example, seed: int = 0, sizes: Mapping[str, int] = SIZES, alias: bool = False) -> OpCall:
    args, kwargs = example.arguments(seed, sizes)
    call = OpCall(example.target, tuple(args), kwargs, torch.empty(()))
    if alias:
        for k, x in enumerate(call.operands[1:], 1):
            if x.shape == call.operands[0].shape:
                args, kwargs = call.with_operand(k, call.operands[0])
                call = OpCall(example.target, args, kwargs, torch.empty(()))
    out = example.target(*call.args, **call.kwargs)
    return replace(
        call,
        out=out if isinstance(out, Tensor) else out[example.part],
        part=None if isinstance(out, Tensor) else example.part,
    )


def reference(call: OpCall, operand: int) -> Tensor:
    x = call.operands[operand]
    if not call.out.is_floating_point() or not call.out.numel() or not x.numel():
        return torch.zeros(*call.out.shape, *x.shape, dtype=torch.float64)
    if call.target is aten.copy.default:  # autograd knows it in place only
        return torch.func.jacrev(lambda *t: t[0].clone().copy_(t[1]), operand)(*call.operands)
    if call.target is torch.ops.dualform.ctc.default:  # no transform takes a registered gradient
        found: Any = torch.autograd.functional.jacobian(lambda t: call.run(operand, t), x)
        return found
    return torch.func.jacrev(lambda t: call.run(operand, t), chunk_size=1)(x)


def probed(call: OpCall, operand: int) -> Tensor:
    """Central differences, for the few ops that torch does not differentiate."""
    x, h = call.operands[operand], 1e-6
    if not x.numel():
        return torch.zeros(*call.out.shape, *x.shape, dtype=torch.float64)
    steps = (h * torch.eye(x.numel(), dtype=x.dtype)).reshape(-1, *x.shape)
    columns = [(call.run(operand, x + s) - call.run(operand, x - s)) / (2 * h) for s in steps]
    return torch.stack(columns, -1).reshape(*call.out.shape, *x.shape)


def truth(call: OpCall, operand: int) -> tuple[Tensor, bool]:
    """The derivative, and whether it is autograd's."""
    if call.kwargs.get("include_self") is False and call.operands[0] is call.operands[-1]:
        return probed(call, operand), False  # torch shares the gradient with a tie that does not take part
    try:
        return reference(call, operand), True
    except RuntimeError as error:
        # Not implemented, or wrong: scatter's backward does not know a source that is larger than the index.
        known = ("differentiable", "not implemented", "returned an invalid gradient", "not support dtype")
        assert any(words in str(error) for words in known), error  # noqa: PT017
        return probed(call, operand), False


def check(call: OpCall, operand: int) -> Derivative:
    """dense, vjp, jvp and the transpose against autograd."""
    x, J = call.operands[operand], derivative(call, operand)
    assert J.shape == (*call.out.shape, *x.shape)
    expected, exact = truth(call, operand)
    if not exact:
        torch.testing.assert_close(J.dense(), expected, rtol=1e-6, atol=1e-6)
        return J
    torch.testing.assert_close(J.dense(), expected.to(J.dtype), **TIGHT)
    if call.out.is_floating_point():
        g, v = torch.randn_like(call.out), torch.randn_like(x)
        torch.testing.assert_close(J.vjp(g), torch.tensordot(g, expected, g.ndim), **TIGHT)
        torch.testing.assert_close(J.jvp(v), torch.tensordot(expected, v, v.ndim), **TIGHT)
        torch.testing.assert_close(J.T.jvp(g), J.vjp(g), **TIGHT)
    return J


def is_spelt_out(row: Row) -> bool:
    """Is it in the table for how it is traced or generated alone?"""
    return row.definition is None and bool(row.mapped or row.lowered)


def test_every_row_has_an_example() -> None:
    bare = [name for name, row in ROWS.items() if not row.examples and not (row.rule is None and is_spelt_out(row))]
    # Only what has no value to compare may lack one: uninitialised memory, what works in place; and what no rule
    # differentiates.
    assert all("empty" in name or name.endswith("_") for name in bare), bare


@pytest.mark.parametrize("example", CASES)
def test_row_is_exact(example: Example, recwarn: pytest.WarningsRecorder) -> None:
    call = make_call(example)
    for operand in range(len(call.operands)):
        check(call, operand)
    assert not [w for w in recwarn.list if "derivative row" in str(w.message)]


@settings(max_examples=12 * settings().max_examples)
@given(st.sampled_from(EXAMPLES), st.data(), st.integers(0, 99), st.booleans())
def test_rows_are_exact_at_drawn_sizes(example: Example, data: st.DataObject, seed: int, alias: bool) -> None:
    """Sizes 0 and 1, matrices that are square or not, and the same tensor passed twice."""
    sizes = dict(SIZES) | {a: data.draw(st.sampled_from([1, 2, 3, 4, 0]), label=a) for a in sorted(example.letters)}
    try:
        call = make_call(example, seed, sizes, alias)
    except (RuntimeError, IndexError, ValueError):
        assume(False)  # the op itself refuses these sizes
    assume(call.out.isfinite().all() and math.prod((call.out.numel(), *(x.numel() for x in call.operands[:1]))) < 20000)
    for operand in range(len(call.operands)):
        check(call, operand)


@pytest.mark.parametrize("example", [e for e in EXAMPLES if find_row(e.target).adjoint], ids=str)
def test_what_has_an_adjoint_is_pulled_back_without_its_terms(
    example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = make_call(example)

    def never(*_: Any) -> Any:
        raise AssertionError("its terms were made")

    found = find_row(call.target)
    monkeypatch.setattr(local_rules, "row_of", lambda _: replace(found, rule=never))
    expected, x = reference(call, 0), call.operands[0]
    J = derivative(call, 0)
    torch.testing.assert_close(J.jvp(x), torch.tensordot(expected, x, x.ndim), **TIGHT)
    torch.testing.assert_close(J.vjp(call.out), torch.tensordot(call.out, expected, call.out.ndim), **TIGHT)


@pytest.mark.parametrize("example", [e for e in EXAMPLES if ("include_self", False) in e.kwargs], ids=str)
def test_rows_are_exact_where_nothing_is(example: Example) -> None:
    """No entries at all, one tensor passed twice: what is compared with differences, not with autograd."""
    call = make_call(example, 0, dict(SIZES) | dict.fromkeys(example.letters, 0), True)
    for operand in range(len(call.operands)):
        check(call, operand)


@pytest.mark.parametrize("example", [row.examples[0] for row in ROWS.values() if row.examples], ids=str)
def test_a_wrong_rule_is_caught(example: Example) -> None:
    """The law bites: a coefficient off by a hundredth, or a lost term, is seen."""
    call = make_call(example)
    for operand in range(len(call.operands)):
        J = derivative(call, operand)
        dense = J.dense().nan_to_num()
        if not dense.any():
            continue
        largest = max(
            J.terms,
            key=lambda t: Derivative([t], J.out_shape, J.in_shape, J.dtype, J.device).dense().abs().max().item(),
        )
        rest = [t for t in J.terms if t is not largest]
        for wrong in (rest, [replace(largest, coef=1.01 * largest.coef), *rest]):
            mutated = Derivative(wrong, J.out_shape, J.in_shape, J.dtype, J.device).dense()
            assert (mutated - truth(call, operand)[0]).abs().max() > 1e-8


@pytest.mark.parametrize("example", CASES)
def test_claimed_affinity_is_true(example: Example) -> None:
    """Second differences vanish along a joint change of the operands; probing only ever tests a claim."""
    call = make_call(example)
    if not call.out.is_floating_point():
        return
    count = len(call.operands)
    for group in (g for n in range(1, count + 1) for g in itertools.combinations(range(count), n)):
        if affine(call, frozenset(group)):
            change = [torch.rand_like(call.operands[j]) for j in group]
            f = [_joint(call, group, change, scale) for scale in (0.0, 1.0, 2.0)]
            torch.testing.assert_close(f[2] - f[1], f[1] - f[0], rtol=1e-9, atol=1e-9)


def _joint(call: OpCall, group: tuple[int, ...], change: list[Tensor], scale: float) -> Tensor:
    for operand, step in zip(group, change, strict=True):
        args, kwargs = call.with_operand(operand, call.operands[operand] + scale * step)
        call = replace(call, args=args, kwargs=kwargs)
    result = call.target(*call.args, **call.kwargs)
    return result if call.part is None else result[call.part]


@pytest.mark.parametrize("example", CASES)
def test_claimed_products_are_products(example: Example) -> None:
    call = make_call(example)
    known: Any = find_row(call.target)
    if known.multilinear and known.form is not None and len(known.form(call).axes) == len(call.operands):
        for operand, x in enumerate(call.operands):
            torch.testing.assert_close(call.run(operand, 3 * x), 3 * call.out)
            assert len(derivative(call, operand).terms) == 1


@pytest.mark.parametrize(
    ("target", "groups"),
    [
        (aten.mm.default, [{0}, {1}]),
        (aten.linear.default, [{0, 2}, {1, 2}]),
        (aten.addmm.default, [{0, 1}, {0, 2}]),
        (aten.layer_norm.default, [{1, 2}]),
        (aten.group_norm.default, [{1, 2}]),
        (aten.mul.Tensor, [{0}, {1}]),
        (aten.div.Tensor, [{0}]),
        (aten.where.self, [{0, 1}]),
        (aten.cat.default, [{0, 1, 2}]),
        (aten.exp.default, []),
        (aten.conv1d.default, [{0, 2}, {1, 2}]),
        (aten.linalg_solve.default, [{1}]),
    ],
)
def test_affine_says_what_design_says(target: Any, groups: list[set[int]]) -> None:
    for n in (1, 2, 3):
        for group in itertools.combinations(range(3), n):
            expected = any(set(group) <= g for g in groups)
            if max(group) < max((max(g) for g in groups), default=0) + 1:
                assert affine(target, frozenset(group)) == expected, group


# -- entry by entry: torch's tag


def _guess(argument: Any, shift: float) -> Any:
    if argument.has_default_value():
        return argument.default_value
    kind = str(argument.type)
    x = torch.rand(3, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * 0.6 + 0.3
    return {"Tensor": x + shift, "number": 2.0, "float": 0.5, "int": 1, "bool": False, "str": "none"}.get(kind)


def pointwise_calls() -> dict[str, OpCall]:
    """Every functional overload with the tag that takes floating tensors, called on what its schema asks for."""
    found = {}
    for name in dir(aten):
        packet = getattr(aten, name)
        for overload in getattr(packet, "overloads", list)():
            target = getattr(packet, overload)
            if torch.Tag.pointwise not in target.tags or target._schema.is_mutable or "out" in overload:
                continue
            for shift in (0.0, 1.0):
                given = [(a, _guess(a, shift)) for a in target._schema.arguments]
                args = tuple(v for a, v in given if not a.kwarg_only)
                kwargs = {a.name: v for a, v in given if a.kwarg_only}
                try:
                    out = target(*args, **kwargs)
                except (RuntimeError, NotImplementedError):  # of integers only, or of other arguments than guessed
                    continue
                if isinstance(out, Tensor) and not out.isnan().any() and OpCall(target, args, kwargs, out).operands:
                    found[f"{name}.{overload}"] = OpCall(target, args, kwargs, out)
                    break
    return found


def test_every_pointwise_overload_is_diagonal() -> None:
    tried = 0
    for name, call in pointwise_calls().items():
        for operand, x in enumerate(call.operands):
            try:
                expected = reference(call, operand)
            except (RuntimeError, NotImplementedError):  # torch has no derivative to compare
                continue
            J = derivative(call, operand)
            torch.testing.assert_close(
                J.dense(), expected.to(J.dtype), **TIGHT, msg=lambda text, name=name: f"{name}: {text}"
            )
            assert J.nbytes <= 2 * x.nbytes, name
            tried += 1
    assert tried > 200


def test_the_documented_table_has_every_row_and_tells_the_truth() -> None:
    lines = op_table().splitlines()[2:]
    cells = [line.replace("\\|", "/").strip("| ").split(" | ") for line in lines]
    assert [c[0].strip("`") for c in cells] == [
        name.removeprefix("aten::") for name, row in sorted(ROWS.items()) if row.examples
    ]
    assert all(len(c) == 6 for c in cells)
    for cell in cells:
        if " of " in cell[5]:
            kept, dense = map(int, cell[5].split(" of "))
            assert kept <= dense, cell


def test_an_op_that_this_torch_lacks_has_no_row() -> None:
    known, lacking = ROWS["aten::mm"], "aten::an_op_of_another_version"
    for name in (lacking, "aten::mm.an_overload_of_another_version", "a_library_that_is_not_loaded::mm"):
        add_row(replace(known, name=name))
        assert name not in ROWS
    assert all(example.target is not None for row in ROWS.values() for example in row.examples)


# -- without a row


def test_an_op_without_a_row_is_exact_and_says_so_once() -> None:
    x = torch.rand(3, 3, dtype=torch.float64)
    places = torch.tensor([0, 4])
    call = OpCall(aten.put.default, (x, places, x[0, :2]), {}, x.put(places, x[0, :2]))
    local_rules._warned.clear()
    with pytest.warns(UserWarning, match="aten::put has no derivative row"):
        assert derivative(call, 0).terms
    J = derivative(call, 0)
    torch.testing.assert_close(J.dense(), reference(call, 0))
    assert torch.equal(derivative(call, 0).dense(), J.dense())


def test_an_op_that_torch_cannot_differentiate_is_refused_by_name() -> None:
    x = torch.rand(3, dtype=torch.float64) + 1
    call = OpCall(aten.special_zeta.default, (x + 1, x), {}, torch.special.zeta(x + 1, x))
    with pytest.raises(TraceError, match=r"aten::special_zeta by x has no row and no backward in torch.*Detach that"):
        derivative(call, 0).dense()
    with pytest.raises(TraceError, match=r"aten::special_zeta by x has no row and no backward in torch.*Detach that"):
        derivative(call, 0).vjp(x)


def test_a_composite_op_is_differentiated_through_its_definition() -> None:
    x, y = torch.rand(3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    call = OpCall(aten.cosine_similarity.default, (x, y), {}, torch.cosine_similarity(x, y))
    J = derivative(call, 0)
    torch.testing.assert_close(J.dense(), reference(call, 0))
    assert J.nbytes < J.dense_nbytes  # tokens stay apart


def test_a_user_adds_an_op_with_one_row() -> None:
    @row("aten::frac", affine=EACH)
    def _frac(call: OpCall, operand: int) -> list:
        return derivative(OpCall(aten.clone.default, (call.operands[0],), {}, call.out), 0).terms  # type: ignore[return-value]

    try:
        x = torch.rand(3, dtype=torch.float64)
        call = OpCall(aten.frac.default, (x,), {}, x.frac())
        assert torch.equal(derivative(call, 0).dense(), torch.eye(3, dtype=torch.float64))
        assert affine(call, frozenset({0}))
    finally:
        del ROWS["aten::frac"]


TRACED = [row.examples[0] for name, row in ROWS.items() if row.affine and row.examples]


@pytest.mark.parametrize("example", TRACED, ids=str)
def test_rows_of_sites_work_inside_a_trace(example: Example) -> None:
    """What a dual form is derived from is traced with stand-ins: no row that claims affinity may read a value."""
    call = make_call(example)
    if not call.out.is_floating_point() or not call.operands:
        return
    x, g = call.operands[0].contiguous(), torch.randn_like(call.out)

    def pull(g: Tensor, x: Tensor) -> Tensor:
        args, kwargs = call.with_operand(0, x)
        return derivative(
            replace(call, args=args, kwargs=kwargs, out=_joint(replace(call, args=args, kwargs=kwargs), (), [], 0.0)), 0
        ).vjp(g)

    gm = make_fx(pull, tracing_mode="fake", _allow_non_fake_inputs=True)(g, x)
    torch.testing.assert_close(gm(g, x), pull(g, x))


@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "softmax",
        "layer_norm",
        "scaled_dot_product_attention",
        "cat",
        "conv1d",
        "group_norm",
        "bilinear",
        "gather",
        "cumsum",
    ],
)
def test_rows_work_inside_a_vmap(name: str) -> None:
    call = make_call(ROWS[f"aten::{name}"].examples[0])
    x, g = call.operands[0], torch.randn_like(call.out)

    def pull(g: Tensor, x: Tensor) -> Tensor:
        args, kwargs = call.with_operand(0, x)
        return derivative(OpCall(call.target, args, kwargs, call.target(*args, **kwargs)), 0).vjp(g)

    batched = torch.vmap(pull)(torch.stack([g, 2 * g]), torch.stack([x, x]))
    torch.testing.assert_close(batched[1], 2 * pull(g, x))
