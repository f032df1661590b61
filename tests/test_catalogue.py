"""The registry: one name in any spelling, options that are values, errors that list neighbours."""

import copy
import json
import pickle
from dataclasses import dataclass

import pytest

import dualform as df
from dualform.catalogue import Bound, Catalogue, CatalogueError, UnknownNameError
from dualform.learning.learners import learners

shapes = Catalogue("shapes")


@shapes.record(name="Ball", formula="|x| < r", source="Euclid", aliases=("sphere",))
def ball(radius=1.0, *, open=True):
    if radius <= 0:
        raise ValueError(f"Ball: radius is {radius}; expected > 0.")
    return lambda x: abs(x) < radius


@shapes.record(name="HollowBox")
@dataclass(frozen=True)
class HollowBox:
    side: float
    walls: tuple = (1, 2)

    @property
    def area(self):
        return self.side**2


@shapes.record(name="union_of", nested={"first": shapes})
def union_of(first, scale=2):
    return lambda x: first(x / scale)


@pytest.mark.parametrize("name", ["HollowBox", "hollow_box", "hollow-box", "HOLLOW BOX"])
def test_every_spelling_finds_the_record(name):
    assert shapes[name] is shapes.HollowBox
    assert name in shapes


def test_names_iteration_and_aliases():
    assert list(shapes) == list(shapes.names()) == ["Ball", "HollowBox", "union_of"]
    assert shapes.sphere is shapes["Ball"]
    assert len(shapes) == 3
    assert "cube" not in shapes
    assert {"Ball", "build"} <= set(dir(shapes))


def test_a_bound_record_is_a_value():
    a, b = shapes.Ball(2.0), shapes.ball(radius=2.0, open=True)
    assert a == b
    assert hash(a) == hash(b)
    assert a != shapes.Ball()
    assert a(1.5)
    assert not shapes.Ball()(1.5)
    assert repr(a) == "shapes.Ball(radius=2.0)"
    assert copy.deepcopy(a) is a
    with pytest.raises(AttributeError):
        a.record = None


def test_a_bound_record_goes_through_json_and_back():
    a = shapes.union_of(shapes.HollowBox(3, walls=[1, 5]), scale=4)
    spec = json.loads(json.dumps(a.to_json()))
    assert spec == {"name": "union_of", "first": {"name": "HollowBox", "side": 3, "walls": [1, 5]}, "scale": 4}
    assert shapes.build(spec) == a
    assert hash(shapes.build(spec)) == hash(a)


def test_attributes_are_those_of_what_it_builds():
    box = shapes.HollowBox(3)
    assert box.area == 9
    assert box.build() == HollowBox(3)
    with pytest.raises(AttributeError):
        box.volume  # noqa: B018


@pytest.mark.parametrize(
    "spec",
    ["ball", ("Ball", {}), ["ball", {"radius": 1.0}], {"name": "BALL"}, shapes.Ball()],
    ids=["name", "pair", "list", "dict", "bound"],
)
def test_build_takes_every_kind_of_spec(spec):
    assert shapes.build(spec) == shapes.Ball()


@pytest.mark.parametrize("spec", [3, None, ("ball",), {"radius": 2}, ("ball", 2), Catalogue("other")])
def test_build_refuses_what_is_no_spec(spec):
    with pytest.raises(CatalogueError, match=r"is not a spec.*Ball, HollowBox, union_of"):
        shapes.build(spec)


def test_unknown_names_list_their_neighbours():
    with pytest.raises(UnknownNameError, match=r"shapes: no record is called 'bal'\. Did you mean 'Ball'"):
        shapes["bal"]
    with pytest.raises(ValueError, match="Known: Ball, HollowBox, union_of"):
        shapes.build("qqqq")
    assert not hasattr(shapes, "bal")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shapes.Ball(radios=2), r"shapes\.Ball: unknown option 'radios'. Did you mean 'radius'"),
        (lambda: shapes.HollowBox(), r"missing a required argument: 'side'"),
        (lambda: shapes.Ball(radius=-1), r"radius is -1; expected > 0"),
        (lambda: shapes.Ball(radius=object()), r"option 'radius' is a object"),
        (lambda: shapes.build({"name": "ball", "r": 1}), r"unknown option 'r'"),
        (lambda: shapes.union_of("bal"), r"no record is called 'bal'"),
        (lambda: shapes.union_of(len).to_json(), r"which JSON cannot hold"),
        (lambda: Catalogue("other").build(shapes.Ball()), r"belongs to the catalogue 'shapes'"),
    ],
)
def test_bad_options_are_refused_at_once(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["BALL", "Sphere", "names", "record", "__"])
def test_a_name_is_taken_once(name):
    with pytest.raises(CatalogueError, match=r"already the name of 'Ball'|cannot name a record"):
        shapes.record(name=name)(lambda: None)


def test_options_must_have_names():
    with pytest.raises(CatalogueError, match="cannot be an option"):
        shapes.record(name="loose")(lambda **anything: None)
    with pytest.raises(CatalogueError, match="nested option 'x' is not a parameter"):
        shapes.record(name="loose", nested={"x": shapes})(lambda: None)


def test_bound_records_pickle_where_their_functions_do():
    spec = learners.residual_norm(learners.MLP(depth=3))
    assert isinstance(spec, Bound)
    assert pickle.loads(pickle.dumps(spec)) == spec


@pytest.mark.parametrize("kind", ["learners", "objectives", "rules", "expansions", "fusions", "backends"])
def test_records_are_copied_as_what_they_are(kind):
    for record in map(getattr(df, kind).__getitem__, getattr(df, kind).names()):
        assert pickle.loads(pickle.dumps(record)) is copy.deepcopy(record) is record
