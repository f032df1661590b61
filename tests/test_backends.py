"""A backend is named in any spelling, with its options, wherever one is named; threads may call first at once."""

import threading

import pytest
import torch

import dualform as df
from dualform import testing as laws
from dualform.learning.backends import BackendError, backend_of, backends, backends_key
from dualform.learning.finite import NonFiniteError


@pytest.mark.parametrize(
    ("spec", "key"),
    [
        ("auto", "auto"),
        ("Auto", "auto"),
        ("eager", "eager"),
        ("Eager", "eager"),
        ("CPP", "cpp"),
        (df.backends.cpp(), "cpp"),
        (("EAGER", {}), "eager"),
        ({"name": "Inductor"}, "inductor"),
        (df.backends.inductor(blocks=8), "inductor"),
        (df.backends.inductor(blocks=2), 'inductor {"blocks": 2}'),
        (("inductor", {"blocks": 2}), 'inductor {"blocks": 2}'),
        ({"name": "inductor", "blocks": 2}, 'inductor {"blocks": 2}'),
    ],
)
def test_every_spelling_has_one_key(spec, key):
    assert backends_key(spec) == key
    assert backends_key(key.partition(" ")[0]) == key.partition(" ")[0]
    if key != "auto":
        assert backend_of(key).blocks == backends.build(spec).build().blocks


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("eagre", r"backend is 'eagre'; expected 'auto' or one of \('eager', .*Did you mean 'eager'"),
        ("ato", "Did you mean 'auto'"),
        (("inductor", {"block": 2}), "unknown option 'block'. Did you mean 'blocks'"),
        ({"name": "cpu"}, "no record is called 'cpu'"),
        (None, "backend is None; expected 'auto' or one of"),
        (3, "backend is 3; expected 'auto' or one of"),
        (df.rules.SGD(), "belongs to the catalogue 'rules'"),
    ],
)
def test_what_is_no_backend_is_refused(spec, message):
    program = df.derive(df.learners.Linear()(4), chunk=2)
    x = torch.randn(1, 4, 1, 4)
    with pytest.raises(BackendError, match=message):
        program(x, x, x, backend=spec)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.*` is deprecated:DeprecationWarning"
)  # torch's own, where inductor is imported
def test_calls_layers_and_checks_take_records():
    torch.manual_seed(0)
    program = df.derive(df.learners.Linear()(4).double(), chunk=2)
    x = torch.randn(2, 4, 2, 4, dtype=torch.float64)
    wanted = program(x, x, x, backend="eager")[0]
    for spec in (df.backends.inductor(blocks=2), ("Inductor", {"blocks": 2}), "CPP", df.backends.eager()):
        laws.agree(str(spec), program(x, x, x, backend=spec, nan_policy="raise")[0], wanted)
    layer = df.TestTimeTraining(8, 2, learner="linear", chunk=2).double()
    y = torch.randn(1, 5, 8, dtype=torch.float64)
    wanted = layer(y)[0]
    for spec in (df.backends.cpp(), "Eager", ("eager", {})):
        layer.backend = spec
        laws.agree(str(spec), layer(y)[0], wanted)
    assert program.schedule("CPP").keys() == program.schedule(df.backends.cpp()).keys()
    bad = x.clone()
    bad[1, 2] = torch.inf
    with pytest.raises(NonFiniteError, match="row 1, head 0, from mini-batch 1"):
        program(bad, bad, bad, backend="EAGER", nan_policy="raise")


def from_many_threads(program, lengths, backend):
    """Call at all lengths at once, then alone."""
    found, errors, start = {}, [], threading.Barrier(len(lengths))

    def call(T):
        x = torch.randn(2, T, 2, 4, generator=torch.Generator().manual_seed(T), dtype=torch.float64).requires_grad_()
        o, state = program(x, x, x.cos(), backend=backend)
        loss = o.square().sum() + sum(w.sum() for w in state.anchor.values())
        return [o.detach(), *torch.autograd.grad(loss, [x, *program.learner.parameters()])]

    def work(T):
        try:
            start.wait()
            found[T] = call(T)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(T,)) for T in lengths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for T in lengths:
        for a, b in zip(found[T], call(T), strict=True):
            laws.agree(f"T = {T}", a, b)


@pytest.mark.parametrize("repetition", range(3))
def test_first_calls_of_many_threads(repetition):
    """Eight threads, eight new lengths, forward and backward: the numbers of one thread, no error."""
    torch.manual_seed(repetition)
    rule = df.rules.SGD(lr=0.3, momentum=0.2)
    program = df.derive(df.learners.Linear()(4).double(), rule=rule, chunk=3 + repetition)
    from_many_threads(program, range(4, 12), "eager")


def test_first_calls_of_many_threads_compile_once():
    torch.manual_seed(0)
    program = df.derive(df.learners.Linear()(4).double(), chunk=2)
    from_many_threads(program, (4, 6), "cpp")
