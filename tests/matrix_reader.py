"""Reads matrix notation back and evaluates it: shares no code with what prints it.

2 Aᵀ (A x - b)/‖x‖³        diag(p) - p pᵀ        with the values of the names, and the shape of what the whole stands for
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

TOKEN = re.compile(
    r"\s*(?P<call>[A-Za-z_][A-Za-z_0-9₀-₉]*)(?=\()|(?P<name>[A-Za-z_][A-Za-z_0-9.]*)|\s*(?P<number>√?[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)"
    r"|\s*(?P<power>[⁻⁰¹²³⁴⁵⁶⁷⁸⁹ᵀ]+)|\s*(?P<norm>‖)(?P<kind>[₀-₉]?)|\s*(?P<mark>[-+∘⊘⊗/()𝟏,>]|\[|\])|\s+"
)
DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉", "01234567890123456789")
FUNCTIONS = {
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "exp": torch.exp, "log": torch.log, "sqrt": torch.sqrt,
    "abs": torch.abs, "sign": torch.sign, "sin": torch.sin, "cos": torch.cos,
    "det": lambda A: torch.linalg.det(A).reshape(1, 1), "tr": lambda A: A.trace().reshape(1, 1),
    "diag": lambda v: v[:, 0].diag(), "prod": lambda v: v.prod().reshape(1, 1), "mean": lambda v: v.mean().reshape(1, 1),
    "std": lambda v: v.std().reshape(1, 1), "softmax": lambda v: v.softmax(0),
    "log_softmax": lambda v: v.log_softmax(0),
    "u₁": lambda A: torch.linalg.svd(A)[0][:, :1], "v₁": lambda A: torch.linalg.svd(A)[2][:1].T,
}  # fmt: skip


class Unfit(Exception):
    """A size that was guessed for I, 𝟏, onehot or e does not fit."""


class Reader:
    """One reading, with sizes for what has none of its own."""

    def __init__(self, text: str, tensors: Mapping[str, Tensor], sizes: Iterator[int]) -> None:
        self.tokens = [m for m in TOKEN.finditer(text) if m[0].strip()]
        assert "".join(m[0] for m in self.tokens).replace(" ", "") == text.replace(" ", ""), text
        self.at = 0
        self.tensors = tensors
        self.sizes = sizes

    def seen(self) -> str:
        return self.tokens[self.at][0].strip() if self.at < len(self.tokens) else ""

    def take(self) -> re.Match:
        self.at += 1
        return self.tokens[self.at - 1]

    def sum(self) -> Tensor:
        sign = -1 if self.seen() == "-" and self.take() else 1
        total = sign * self.scaled()
        while self.seen() in ("+", "-"):
            sign = -1 if self.take()[0].strip() == "-" else 1
            total = fit(total, sign * self.scaled(), torch.add)
        return total

    def scaled(self) -> Tensor:
        value = self.entrywise()
        while self.seen() == "/":
            self.take()
            value = value / number(self.factor())
        return value

    def entrywise(self) -> Tensor:
        value = self.chain()
        while self.seen() in ("∘", "⊘", "⊗"):
            mark = self.take()[0].strip()
            other = self.chain()
            value = (
                torch.kron(value, other) if mark == "⊗" else fit(value, other, torch.mul if mark == "∘" else torch.div)
            )
        return value

    def chain(self) -> Tensor:
        value = self.factor()
        while self.seen() and self.seen() not in tuple("+-∘⊘⊗/),>]") and not self.closes():
            value = times(value, self.factor())
        return value

    def closes(self) -> bool:
        return bool(self.tokens[self.at]["norm"]) and self.open > 0

    open = 0

    def factor(self) -> Tensor:
        m = self.take()
        word = m[0].strip()
        if m["number"]:
            value = torch.full((1, 1), float(m["number"].strip("√")), dtype=torch.float64)
            value = value.sqrt() if m["number"].startswith("√") else value
        elif m["call"]:
            value = self.call(m["call"])
        elif m["norm"]:
            assert not m["kind"]
            self.open += 1
            inside = self.sum()
            self.open -= 1
            kind = self.take()["kind"].translate(DIGITS)
            value = torch.linalg.vector_norm(inside, float(kind or 2)).reshape(1, 1)
        elif word == "𝟏":
            value = torch.ones(next(self.sizes), 1, dtype=torch.float64)
        elif word == "I":
            value = torch.eye(next(self.sizes), dtype=torch.float64)
        elif word == "[":
            value = (self.sum() > 0).double()
            assert [self.take()[0].strip() for _ in range(3)] == [">", "0", "]"]
        elif word == "(":
            value, self.open, before = None, 0, self.open
            value = self.sum()
            assert self.take()[0].strip() == ")"
            self.open = before
        else:
            t = self.tensors[m["name"]].to(torch.float64)
            kept = [n for n in t.shape if n != 1]
            value = t.reshape([*kept, *[1] * (2 - len(kept))])
        while self.at < len(self.tokens) and self.tokens[self.at]["power"]:
            value = powered(value, self.take()["power"])
        return value

    def call(self, name: str) -> Tensor:
        self.take()
        if name == "onehot":
            labels = self.tensors[self.take()[0].strip()]
            self.take()
            size = next(self.sizes)
            if size <= labels.max():
                raise Unfit
            return torch.nn.functional.one_hot(labels, size).double()
        if name == "e":
            k, _ = int(self.take()[0]), self.take()
            size = next(self.sizes)
            if size <= k:
                raise Unfit
            return torch.eye(size, dtype=torch.float64)[:, k : k + 1]
        before, self.open = self.open, 0
        inside = self.sum()
        self.open = before
        assert self.take()[0].strip() == ")"
        return FUNCTIONS[name](inside) if name in FUNCTIONS else getattr(torch, name)(inside)


def number(value: Tensor) -> Tensor:
    if value.shape != (1, 1):
        raise Unfit
    return value


def fit(a: Tensor, b: Tensor, op: object) -> Tensor:
    if a.shape != b.shape and 1 not in (a.numel(), b.numel()):
        raise Unfit
    return op(a, b)  # type: ignore[operator]


def times(a: Tensor, b: Tensor) -> Tensor:
    if 1 in (a.numel(), b.numel()):
        return a * b
    if a.shape[1] != b.shape[0]:
        raise Unfit
    return a @ b


def powered(value: Tensor, power: str) -> Tensor:
    if power.endswith("ᵀ"):
        value, power = value.mT, power.removesuffix("ᵀ")
        if power == "⁻":
            return torch.linalg.inv(value)
        if not power:
            return value
    exponent = int(power.replace("⁻", "-").translate(DIGITS))
    if value.shape[0] != value.shape[1]:
        raise Unfit
    return torch.linalg.matrix_power(value, exponent)


def evaluate(text: str, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> list[Tensor]:
    """What a text stands for: one value for each choice of sizes that fits the shape; they are one if it is clear."""
    known = ({n for t in tensors.values() for n in t.shape} | set(shape)) - {0, 1}
    count = len(re.findall(r"𝟏|\bI\b|onehot\(|\be\(", text))
    whole = [n for n in shape if n != 1]
    two = (*whole, *[1] * (2 - len(whole)))
    found = []
    for sizes in product(sorted(known), repeat=count):
        reader = Reader(text, tensors, iter(sizes))
        try:
            value = reader.sum()
        except Unfit:
            continue
        assert reader.at == len(reader.tokens), f"cannot read {text!r} from {reader.seen()!r}"
        if tuple(value.shape) == two or (value.numel() == 1 and two == (1, 1)):
            found.append(value.reshape(tuple(shape)))
    return found
