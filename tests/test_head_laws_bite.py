"""The laws of functions bite: one planted wrong record each."""

from dataclasses import replace

import pytest
import torch
from test_laws_bite import bites

import dualform as df
from dualform import testing as laws
from dualform.functions import head as head_module
from dualform.functions.multilinear import Multilinear, WeightFactor
from dualform.functions.reconciliations import Reconciliation


class Spoilt:
    """A record that is right but for the methods given."""

    def __init__(self, real, **changes):
        self.real, self.changes = real, changes

    def __getattr__(self, name):
        return self.changes.get(name, getattr(self.real, name))

    def __call__(self, *args, **kwargs):
        return self.changes.get("call", self.real)(*args, **kwargs)


def test_reconciliations_notice():
    real = df.reconciliations.low_rank(rank=1)
    idle = Reconciliation(Multilinear("idle", (WeightFactor("ia"), WeightFactor("aj"), WeightFactor("b")), rank=1))
    wrong = {
        "gradient": Spoilt(real, call=lambda w, n, D, c=None: real(w, n, D) * (torch.arange(D) > 0)),
        "apply": Spoilt(real, apply=lambda kappa, w, n: real.apply(kappa, w, n) if w.shape[0] != 10 else 2 * real.apply(kappa, w, n)),
        "w of a wrong "
        "length": Spoilt(real, call=lambda w, n, D, c=None: real(w[:10] if len(w) > 9 else w.new_zeros(10), n, D)),
        "shape": Spoilt(real, call=lambda w, n, D, c=None: real(w, n, D).mT),
        "dense again": Spoilt(real, call=lambda w, n, D, c=None: real(w, n, D) + (c is None)),
    }  # fmt: skip
    laws.check_reconciliation(real, 4, 6)
    for name, record in wrong.items():
        assert name in bites(laws.check_reconciliation, record, 4, 6), name
    laws.check_reconciliation(idle, 4, 6)  # a factor that scales all: it counts, and every entry matters


def test_remainders_notice():
    real = df.remainders.linear()
    for name, call in {
        "shape": lambda x, n, w=None, b=None: real(x, n, w, b).sum(-1),
        "rows alone": lambda x, n, w=None,
        b=None: real(x, n, w, b) + (x.mean(0).sum() if x.ndim > 1 and x.shape[0] else 0),
        "no w": lambda x, n, w=None, b=None: real(x, n, x.new_ones(n, x.shape[-1]) if w is None else w, b),
        "gradient": lambda x, n, w=None, b=None: real(x, n, w * 0 if w is not None else w, b),
    }.items():  # fmt: skip
        assert name in bites(laws.check_remainder, Spoilt(real, call=call), 4, 3), name


def test_fusions_notice():
    real = df.fusions.parameterized_concatenation(n=2)
    for name, call in {
        "shape": lambda xs, w=None, n=None: real(xs, w, n).sum(-1, keepdim=True),
        "rows alone": lambda xs, w=None,
        n=None: real(xs, w, n) + (xs[0].mean(0).sum() if xs[0].ndim == 2 and len(xs[0]) else 0),
        "w of a wrong length": lambda xs, w=None, n=None: real(xs, w if w is None else w[:24], n),
    }.items():  # fmt: skip
        assert name in bites(laws.check_fusion, Spoilt(real, call=call), (4, 4, 4)), name


def test_heads_notice(monkeypatch):
    made = df.Head(4, 3, expansion="taylor", reconciliation="masking", remainder="linear")
    laws.check_head(made)
    real = head_module.features
    with monkeypatch.context() as m:
        m.setattr(head_module, "features", lambda e, x: real(e, x)._replace(right=x.flip(-1)))
        assert "formula" in bites(laws.check_head, made)
    with monkeypatch.context() as m:
        m.setattr(df.Head, "_freeze", lambda self, prefix, constants: {})
        m.setattr(df.Head, "constants", lambda self: {"places": torch.randint(0, 31, (3, 20))})  # drawn in forward
        bites(laws.check_head, df.Head(4, 3, expansion="taylor", reconciliation="masking"))
    with monkeypatch.context() as m:
        m.setattr(head_module.HeadConfig, "to_toml", lambda self: replace(self, channels=2).to_json().replace(":", "="))
        with pytest.raises(ValueError, match=r"Invalid|Expected"):
            laws.check_head(made)
    with monkeypatch.context() as m:
        m.setattr(head_module.HeadConfig, "from_json", classmethod(lambda cls, text: cls(4, 3)))
        assert "json" in bites(laws.check_head, made)


def test_the_first_scale_is_noticed():
    torch.manual_seed(0)  # the mean square of one draw of w differs from 1 by some percent
    made = df.Head(4, 3, expansion="legendre")
    laws.check_unit_scale(made)
    with torch.no_grad():
        made.w.mul_(1.2)
    assert "mean square: 1.4" in bites(laws.check_unit_scale, made)
