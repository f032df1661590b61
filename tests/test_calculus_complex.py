"""Real functions that go through complex tensors: exact, in structure, and refused by name where there is no rule.

`share` bounds the numbers kept, as a share of the dense derivative.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fft

from dualform.calculus import clear_cache, hessian, jacobian
from dualform.cli.expression import compile_expression
from dualform.graphs import complex_pairs, local_rules
from dualform.shapes import TraceError

generator = torch.Generator().manual_seed(0)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


X, V, W, K = rand(3, 8), rand(8), rand(2, 6), rand(8)
C = torch.complex(rand(5), rand(5))
TURNS = torch.polar(torch.ones(3, 4, dtype=torch.float64), rand(3, 4))
HANN = torch.hann_window(4, dtype=torch.float64)
real = torch.view_as_real


def z(x: Tensor) -> Tensor:
    return torch.complex(x, x * x - 1)


def written(x: Tensor) -> Tensor:
    y = fft.rfft(x).clone()
    y[0], y[2:] = 0, y[:3] * 2
    return y.mul_(1j).abs()


FUNCTIONS: dict[str, tuple[float, Callable[[Tensor], Tensor], Tensor]] = {
    "magnitude": (0.34, lambda x: fft.rfft(x).abs(), X), "power": (0.34, lambda x: fft.rfft(x).abs().square(), X),
    "real": (0.12, lambda x: fft.fft(x).real, X),
    "parts": (0.12, lambda x: real(fft.fft(x)), X), "two dims": (0.15, lambda x: real(fft.fft2(x)), X),
    "inverse": (0.12, lambda x: fft.ifft(x).imag, X),
    "convolution": (0.12, lambda x: fft.irfft(fft.rfft(x) * fft.rfft(K), n=8), X),
    "kernel": (1, lambda k: fft.irfft(fft.rfft(X) * fft.rfft(k), n=8), K),
    "there and back": (0.12, lambda x: fft.ifft(fft.fft(x)).real, X),
    "shift": (0.34, lambda x: fft.ifftshift(fft.fftshift(fft.fft(x), -1), -1).abs(), X),
    "angle": (1, lambda x: fft.fft(x).angle(), V), "odd": (1, lambda x: fft.irfft(fft.rfft(x[:7]), n=7), V),
    "longer": (0.13, lambda x: real(fft.rfft(x, n=11)), X), "shorter": (0.12, lambda x: real(fft.rfft(x, n=5)), X),
    "hermitian": (1, lambda x: fft.hfft(fft.ihfft(x) * (1 + 2j)), V),
    "ortho": (1, lambda x: fft.irfft2(fft.rfft2(x, norm="ortho"), s=(2, 6)), W),
    "n dims": (0.3, lambda x: real(fft.fftn(x, s=(3, 4), norm="forward")), W),
    "stft": (0.5, lambda x: torch.stft(x, 4, return_complex=True, window=HANN).abs(), V),
    "length one": (1, lambda x: real(fft.rfft(x)), rand(3, 1)),
    "constant": (0.12, lambda x: (fft.rfft(x) * C).imag, X),
    "mask": (1, lambda x: (fft.rfft(x) * (torch.arange(5) < 3)).abs(), V),
    "rotary": (0.1, lambda x: real(torch.view_as_complex(x.reshape(3, 4, 2)) * TURNS), X),
    "conj": (0.34, lambda x: (fft.fft(x) * fft.fft(x).conj()).real, X), "exp": (0.1, lambda x: (1j * x).exp().real, X),
    "complex": (0.1, lambda x: z(x).abs(), X), "polar": (0.1, lambda x: torch.polar(x * x, x).imag, X),
    "quotient": (0.1, lambda x: real((z(x) + 2) / (z(x) * z(2 * x) + 3j)), X),
    "one over": (0.1, lambda x: real(1 / z(x)), X), "log": (0.1, lambda x: real(z(x).log()), X),
    "root": (0.1, lambda x: real(z(x).sqrt()), X),
    "cube": (0.1, lambda x: real(z(x) ** 3), X), "any power": (0.1, lambda x: real(z(x) ** 1.5), X),
    "complex power": (0.1, lambda x: real((x.exp() + 1) ** (1 + 2j)), X), "sign": (0.1, lambda x: real(z(x).sgn()), X),
    "minus": (0.1, lambda x: real(2 - z(x) + 1j), X), "with its sum": (0.2, lambda x: (x + 1j * x.sum(0)).abs(), W),
    "matmul": (0.5, lambda x: real(z(x) @ (x.T * (2 - 1j))), W),
    "einsum": (1, lambda x: torch.einsum("ij,kj->ik", z(x), x * (2 - 1j)).abs(), W),
    "adjoint": (0.3, lambda x: real(z(x).H @ (x * 1j)), W),
    "inner": (1, lambda x: torch.vdot(fft.fft(x), fft.fft(K)).real, V),
    "linear": (0.3, lambda x: torch.nn.functional.linear(x + 0j, TURNS[:, :1].expand(3, 6), TURNS[:, 0]).imag, W),
    "views": (0.2, lambda x: torch.stack([z(x), z(x).conj()]).sum(0).reshape(3, 4).T.imag + torch.cat([z(x), x + 0j]).mean().real, W), "norm": (1, lambda x: fft.rfft(x).norm(), V),
    "choice": (1, lambda x: torch.where(torch.arange(5) > 2, fft.rfft(x), 0).abs(), V),
    "gather": (1, lambda x: fft.fft(x)[torch.tensor([0, 2, 2])].roll(1).imag, V),
    "split": (1, lambda x: fft.fft(x).chunk(2)[1].real, V),
    "in place": (1, written, V), "at zero": (1, lambda x: fft.rfft(x).abs(), torch.zeros(8, dtype=torch.float64)),
    "type": (0.1, lambda x: x.to(torch.complex128).mul(2 + 1j).resolve_conj().imag, X),
    "spectral loss": (1, lambda x: fft.rfft(x).abs().log().sum(), V),
}  # fmt: skip


def check(name: str) -> None:
    share, f, x = FUNCTIONS[name]
    local_rules._warned.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "dualform: .*")
        J = jacobian(f, x)
        found = J.dense()
    expected = torch.func.jacrev(f, chunk_size=1)(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert J.nbytes <= share * J.dense_nbytes
    g, v = rand(*J.out_shape), rand(*J.in_shape)
    for _ in range(2):  # interpreted, then written down
        torch.testing.assert_close(J.vjp(g), torch.tensordot(g, expected, g.ndim), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(J.jvp(v), torch.tensordot(expected, v, v.ndim), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_through_complex_numbers_is_exact(name: str) -> None:
    check(name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_pickle_has_the_structure(name: str) -> None:
    _, f, x = FUNCTIONS[name]
    J = jacobian(f, x)
    assert pickle.loads(pickle.dumps(J)).structure == J.structure


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # torch's own jvp uses it
@pytest.mark.parametrize(
    "f", [lambda x: real(fft.fft(x)), lambda x: fft.irfft(fft.rfft(x).conj()), lambda x: fft.rfft(x).abs()]
)
def test_a_long_transform_is_no_matrix_and_as_right_as_torchs(f: Callable[[Tensor], Tensor]) -> None:
    """In float32, both ways; the matrix of 2^16 points would take 34 GB."""
    x = torch.randn(1 << 16, generator=generator)
    J = jacobian(f, x)
    g, v = torch.randn_like(f(x)), torch.randn_like(x)
    back, forth = (lambda x, g: torch.func.vjp(f, x)[1](g)[0]), lambda x, v: torch.func.jvp(f, (x,), (v,))[1]
    for _ in range(2):  # interpreted, then written down
        for ours, torchs, seed in ((J.vjp, back, g), (J.jvp, forth, v)):
            right = torchs(x.double(), seed.double())
            assert (ours(seed) - right).norm() <= 2 * (torchs(x, seed) - right).norm()
    wave = jacobian(lambda x: fft.fft(x).real, torch.randn(64, generator=generator)).dense()
    assert (wave - fft.fft(torch.eye(64, dtype=torch.float64)).real).abs().max() <= 2**-24


@pytest.mark.parametrize(
    ("name", "rule"), [("conj", "_conj"), ("one over", "reciprocal"), ("adjoint", "mH"), ("hermitian", "_fft_c2r")]
)
def test_a_wrong_rule_is_caught(name: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = complex_pairs.RULES[rule]

    def wrong(r: complex_pairs.PairWriter, node: object, given: dict) -> object:
        made = right(r, node, given)
        return complex_pairs.Pair(made.re, r.neg(made.im)) if isinstance(made, complex_pairs.Pair) else r.neg(made)

    names = [k for k, v in complex_pairs.RULES.items() if v is right]
    for k in names:
        monkeypatch.setitem(complex_pairs.RULES, k, wrong)
    clear_cache()
    with pytest.raises(AssertionError):
        check(name)
    clear_cache()


def test_a_complex_argument_is_a_constant() -> None:
    J = jacobian(lambda x, c: (fft.rfft(x) * c).abs(), V, C)
    expected = torch.func.jacrev(lambda x: (fft.rfft(x) * C).abs(), chunk_size=1)(V)
    torch.testing.assert_close(J.dense(), expected, rtol=1e-10, atol=1e-10)


def test_an_explanation_shows_the_cosines() -> None:
    told = jacobian(lambda x: fft.rfft(x).abs(), X).explain("proof")
    assert max(error for _, error in told.checks) < 1e-12
    assert "cos[j,l] (5, 8): the cosine of 2π times frequency times place, over the length" in str(told)


@pytest.mark.parametrize(
    ("f", "said"),
    [
        (lambda x: torch.linalg.eigvals(x[:, :3]).abs(), r"eigvals\(.*complex numbers by linalg_eig"),
        (lambda x: fft.rfft(x).tanh().real, r"tanh\(\).*complex numbers by tanh.*Write it with real and imaginary"),
        (lambda x: (x, fft.rfft(x)), r"returns a complex tensor.*Return torch.view_as_real\(z\)"),
    ],
)
def test_what_has_no_rule_is_refused_by_name(f: Callable[[Tensor], Tensor], said: str) -> None:
    with pytest.raises(TraceError, match=said):
        jacobian(f, X)


def test_second_derivatives_go_through_complex_numbers() -> None:
    def f(x: Tensor) -> Tensor:
        return fft.irfft(fft.rfft(x) * fft.rfft(x * x), n=8).pow(3).sum()

    torch.testing.assert_close(hessian(f, V).dense(), torch.autograd.functional.hessian(f, V), rtol=1e-10, atol=1e-10)


def test_a_typed_formula_may_hold_a_transform() -> None:
    typed = compile_expression("abs(fft.irfft(torch.fft.rfft(x) * conj(rfft(y)), n=8))", ["x", "y"])
    torch.testing.assert_close(typed(V, K), fft.irfft(fft.rfft(V) * fft.rfft(K).conj(), n=8).abs())
