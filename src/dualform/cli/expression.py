"""A formula typed on the command line, made a function of tensors without running anybody's code.

Allowed: the names that have shapes, numbers, + - * / @ **, unary minus, `.T`, and the functions below with numbers or
bare words (dim=-1) as keywords.
"""

from __future__ import annotations

import ast
import linecache
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dualform.catalogue import near_misses
from dualform.cli.output import UsageError

operators = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.MatMult, ast.Pow, ast.USub, ast.UAdd)
functions: Mapping[str, Callable[..., Any]] = {
    **{name: getattr(torch, name) for name in "exp log sqrt sin cos tanh sigmoid abs relu softmax sum mean".split()},
    **{name: getattr(torch, name) for name in "outer matmul einsum where maximum minimum tril square rsqrt".split()},
    **{name: getattr(F, name) for name in "gelu silu softplus".split()},
    "transpose": lambda x, a=-2, b=-1: x.transpose(a, b),
    "log_softmax": torch.log_softmax,
    "layer_norm": lambda x, *parts: F.layer_norm(x, x.shape[-1:], *parts),
    "rms_norm": lambda x, *parts: F.rms_norm(x, x.shape[-1:], *parts),
}


def parse_shapes(words: list[str]) -> dict[str, tuple[int, ...]]:
    """Read `x=2 y=2,2` (and `s=` for a scalar).

    Example:
        >>> parse_shapes(["x=2", "y=2,3"])
        {'x': (2,), 'y': (2, 3)}
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for word in words:
        name, equals, sizes = word.partition("=")
        try:
            if not equals or not name.isidentifier():
                raise ValueError
            shapes[name] = tuple(int(size) for size in sizes.split(",") if size)
        except ValueError:
            raise UsageError(f"explain: --shapes {word!r} is no shape; expected NAME=SIZE,SIZE as in y=2,2.") from None
    return shapes


def compile_expression(text: str, names: list[str]) -> Callable[..., Tensor]:
    """Make the formula a function of the named tensors, in that order.

    Shape:  what the formula says.
    Dtype:  what the formula says.
    Raises: UsageError for anything that is not a formula of these names.
    Example:
        >>> compile_expression("x * 2 + y", ["x", "y"])(torch.tensor(1), torch.tensor(3))
        tensor(5)
    """
    try:
        body = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise UsageError(
            f"explain: {text!r} is no formula ({error.msg}); expected one as in 'softmax(x @ y, dim=-1)'."
        ) from None
    _check(body, set(names), text)
    # Only now, when nothing but names with shapes, numbers, operators and the functions above is left, is it compiled.
    arguments = ast.arguments(
        posonlyargs=[], args=[ast.arg(n) for n in names], kwonlyargs=[], kw_defaults=[], defaults=[]
    )
    function = ast.fix_missing_locations(ast.Expression(ast.Lambda(arguments, _MatrixT().visit(body))))
    linecache.cache[_FILE] = (len(text), None, [text + "\n"], _FILE)  # so that explanations can quote it
    return eval(compile(function, _FILE, "eval"), {"__builtins__": {}, **functions})


_FILE = "formula"


class _MatrixT(ast.NodeTransformer):
    """Read `.T` as the transpose of the last two axes."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.Attribute:
        return ast.Attribute(self.visit(node.value), "mT", node.ctx)


def _check(node: ast.AST, names: set[str], text: str) -> None:
    match node:
        case ast.BinOp(left=left, op=op, right=right) if isinstance(op, operators):
            parts = [left, right]
        case ast.UnaryOp(op=op, operand=operand) if isinstance(op, operators):
            parts = [operand]
        case ast.Name(id=name) if name in names:
            parts = []
        case ast.Name(id=name):
            raise UsageError(f"explain: {name!r} in {text!r} has no shape. {near_misses(name, sorted(names))}")
        case ast.Constant(value=value) if isinstance(value, (int, float, str)):
            parts = []
        case ast.Attribute(value=value, attr="T"):
            parts = [value]
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in functions:
            parts = [*args, *(k.value for k in keywords if k.arg)]
            if len(parts) != len(args) + len(keywords):
                raise UsageError(f"explain: ** in {text!r} is not part of a formula; expected keywords by name.")
        case ast.Call(func=ast.Name(id=name)):
            raise UsageError(f"explain: there is no function {name!r}. {near_misses(name, sorted(functions))}")
        case ast.Tuple(elts=elements) | ast.List(elts=elements):
            parts = list(elements)
        case _:
            part = ast.unparse(node)
            raise UsageError(
                f"explain: {part!r} in {text!r} is not part of a formula; expected names, numbers, operators, functions."
            )
    for part in parts:
        _check(part, names, text)
