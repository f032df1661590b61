"""The data of an account: a link of the chain, one op's derivative, and a stage of the proof."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dualform.algebra.index_text import IndexFormula
from dualform.algebra.linear_map import Derivative
from dualform.explanations.chain_rule import Move


@dataclass(frozen=True)
class OpStep:
    """One link: d out / d operand of one op, its formula, and the reason for its shape.

    why: the reasons in one line; reasons: one by one; rule: the rule of differentiation behind it
    """

    op: str
    text: str
    formula: IndexFormula
    derivative: Derivative
    why: str = ""
    line: str = ""
    reasons: tuple[str, ...] = ()
    rule: str = ""

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.derivative.out_shape

    @property
    def in_shape(self) -> tuple[int, ...]:
        return self.derivative.in_shape

    @property
    def shape(self) -> tuple[int, ...]:
        return self.derivative.shape

    @property
    def account(self) -> str:
        """out-shape + in-shape = J-shape; how many numbers dense and stored."""
        J = self.derivative
        shapes, dense = f"shape {J.out_shape} + {J.in_shape} = {J.shape}", math.prod(J.shape)
        return f"{shapes}; {dense:,} numbers if dense, {J.nbytes // J.dtype.itemsize:,} stored"

    @property
    def above(self) -> str:
        """The name of what is differentiated."""
        return self.formula.symbol.split("/")[0][1:]

    @property
    def below(self) -> str:
        """The name of what it is differentiated by."""
        return self.formula.symbol.split("/")[1][1:]


@dataclass(frozen=True)
class Stage:
    """One part of the proof: a step's result by the input; all its lines are equal, `moves[-1]` is the simplest."""

    symbol: str
    moves: tuple[Move, ...]
    out_shape: tuple[int, ...]

    @property
    def has_copies(self) -> bool:
        """Does a sum over a broadcast axis come up?"""
        return any("every copy contributes" in move.reason for move in self.moves)


class Letters:
    """What letters stand for, said once each."""

    def __init__(self) -> None:
        self.said: set[str] = set()

    def of(self, f: IndexFormula) -> list[IndexFormula]:
        """Those of a formula that were not said before."""
        new = [letter for letter in f.where if letter.symbol not in self.said]
        self.said |= {letter.symbol for letter in new}
        return new
