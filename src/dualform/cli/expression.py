"""A formula typed on the command line, made a function of tensors without running anybody's code.

Allowed: the names that have shapes, numbers, + - * / @ ** and comparisons, `.T`, slices and indices, and the functions
and methods listed here, with numbers, words and lists as arguments. What is not allowed is pointed at.
"""

from __future__ import annotations

import ast
import keyword
import linecache
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from dualform.catalogue import near_misses
from dualform.cli.output import UsageError

operators = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.MatMult, ast.Pow, ast.USub, ast.UAdd)
comparisons = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)

_both = """
    abs exp expm1 log log1p log2 sqrt rsqrt square sin cos tan tanh sinh cosh asin acos atan sigmoid relu reciprocal neg
    erf softmax log_softmax sum mean prod var std amax amin logsumexp cumsum cumprod norm maximum minimum clamp pow
    outer matmul mm bmm mv dot add sub mul div where masked_fill index_select gather flip roll tril triu diagonal diag
    transpose permute reshape flatten unflatten unsqueeze squeeze movedim broadcast_to narrow select take_along_dim sort
    inverse det trace cholesky logdet unbind split chunk angle conj
""".split()
_functions = """
    einsum stack cat kron tensordot addmm baddbmm atan2 lerp cdist zeros_like ones_like complex polar real imag
    view_as_real view_as_complex cov corrcoef combinations vander
""".split()
_transforms = "fft ifft rfft irfft fft2 ifft2 rfft2 irfft2 fftn ifftn fftshift ifftshift".split()
_methods = "expand view repeat expand_as view_as mean clone t float double max min unfold swapaxes detach".split()
_layers = """
    gelu silu softplus elu selu leaky_relu mish hardtanh logsigmoid linear bilinear conv1d conv2d conv3d avg_pool1d
    avg_pool2d max_pool1d max_pool2d pad group_norm normalize scaled_dot_product_attention mse_loss
    cross_entropy cosine_similarity one_hot glu unfold l1_loss smooth_l1_loss binary_cross_entropy nll_loss
    softmin embedding
""".split()

_matrices = {name: f for name, f in vars(torch.linalg).items() if callable(f) and name.islower() and name[0] != "_"}


def _made(make: Callable[..., Tensor], counts: Callable[..., Any]) -> Callable[..., Tensor]:
    """A tensor of numbers alone: whole ones, or of the precision that names have; not of too many."""

    def run(*args: Any, **more: Any) -> Tensor:
        asked = counts(*args, **more)
        if asked > MAX_NUMBERS:
            raise ValueError(f"{make.__name__} makes {asked:,} numbers; expected at most {MAX_NUMBERS:,}")
        made = make(*args, **more)
        return make(*args, **more, dtype=torch.float64) if made.is_floating_point() else made

    return run


def _count(*sizes: Any) -> int:
    return torch.Size(sizes[0] if sizes and isinstance(sizes[0], (list, tuple)) else sizes).numel()


_factories: dict[str, Callable[..., Tensor]] = {
    "eye": _made(torch.eye, lambda n, m=None: n * (n if m is None else m)),
    "arange": _made(torch.arange, lambda start, end=None, step=1: (start if end is None else end - start) / step),
    "linspace": _made(torch.linspace, lambda start, end, steps: steps),
    "zeros": _made(torch.zeros, _count), "ones": _made(torch.ones, _count),
    "full": _made(torch.full, lambda size, value: _count(size)), "tensor": _made(torch.tensor, lambda numbers: 1),
}  # fmt: skip
functions: Mapping[str, Callable[..., Any]] = {
    **_matrices,
    **{name: getattr(torch, name) for name in [*_both, *_functions] if hasattr(torch, name)},
    **{name: getattr(F, name) for name in _layers},
    **{name: getattr(torch.fft, name) for name in _transforms},
    "transpose": lambda x, a=-2, b=-1: x.transpose(a, b),
    "layer_norm": lambda x, *parts, **more: F.layer_norm(x, *_with_shape(x, parts), **more),
    "rms_norm": lambda x, *parts, **more: F.rms_norm(x, *_with_shape(x, parts), **more),
    "attention": F.scaled_dot_product_attention,
    "max": torch.amax,
    "min": torch.amin,
    **_factories,
}
methods: Collection[str] = frozenset(name for name in [*_both, *_methods] if hasattr(Tensor, name))
_of_package = {f"{package}.{name}": f for package in ("torch.linalg", "linalg") for name, f in _matrices.items()}
_packages = (
    "linalg",
    "torch",
    "F",
    "nn.functional",
    "torch.nn.functional",
    "torch.linalg",
    "torch.special",
    "torch.fft",
    "fft",
)
_words = {"pi": torch.pi, "inf": float("inf")}

MAX_TEXT = 4000
MAX_NUMBERS = 2**24
_FILE = "formula"


def _with_shape(x: Tensor, parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """Let layer_norm(x, w, b) mean the last axis."""
    given = bool(parts) and not isinstance(parts[0], Tensor) and parts[0] is not None
    return parts if given else (x.shape[-1:], *parts)


class Shape(tuple[int, ...]):
    """Sizes, and of what: "float", "int" or "bool"."""

    kind: str


KINDS = ("float", "int", "bool")


def parse_shapes(words: list[str]) -> dict[str, Shape]:
    """Read `x=2 y=2,2 k=3:int m=3:bool` (and `s=` for a scalar).

    Example:
        >>> parse_shapes(["x=2", "y=2,3"])
        {'x': (2,), 'y': (2, 3)}
    """
    shapes: dict[str, Shape] = {}
    for word in words:
        name, equals, sizes = word.partition("=")
        sizes, _, kind = sizes.partition(":")
        if kind not in ("", *KINDS):
            raise UsageError(
                f"explain: --shapes {word!r} asks for {kind!r}; expected one of {', '.join(KINDS)}, as in y=3:int. "
                f"{near_misses(kind, list(KINDS))}"
            )
        try:
            shape = tuple(int(size) for size in sizes.strip("()[]").split(",") if size.strip())
        except ValueError:
            shape = (-1,)
        if not equals or not name.isidentifier() or keyword.iskeyword(name) or min(shape, default=0) < 0:
            raise UsageError(f"explain: --shapes {word!r} is no shape; expected NAME=SIZE,SIZE as in y=2,2.")
        if name in shapes:
            raise UsageError(f"explain: --shapes names {name!r} twice; expected one shape for each name.")
        if torch.Size(shape).numel() > MAX_NUMBERS:
            raise UsageError(
                f"explain: {name} has {torch.Size(shape).numel():,} numbers; expected at most {MAX_NUMBERS:,}. "
                "Take smaller sizes: the structure is the same."
            )
        shapes[name] = Shape(shape)
        shapes[name].kind = kind or "float"
    return shapes


def drawn(shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Numbers of these shapes: between 1/2 and 3/2; whole ones that are places on every axis; truth values."""
    generator = torch.Generator().manual_seed(0)
    below = min((n for shape in shapes.values() if shape.kind == "float" for n in shape), default=2)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        numbers = torch.rand(shape, dtype=torch.float64, generator=generator)
        made = {"float": numbers + 0.5, "int": (numbers * below).long(), "bool": numbers > 0.5}
        tensors[name] = made[shape.kind]
    return tensors


def compile_expression(text: str, names: list[str]) -> Callable[..., Tensor]:
    """Make the formula a function of the named tensors, in that order.

    Shape:  what the formula says.
    Dtype:  what the formula says.
    Raises: UsageError for anything that is not a formula of these names, pointing at the character.
    Example:
        >>> compile_expression("x * 2 + y", ["x", "y"])(torch.tensor(1), torch.tensor(3))
        tensor(5)
    """
    text = " ".join(text.split())
    if len(text) > MAX_TEXT:
        raise UsageError(f"explain: the formula has {len(text):,} characters; expected at most {MAX_TEXT:,}.")
    try:
        body = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        at = error.offset - 1 if error.offset and error.lineno == 1 else len(text)  # what ends too early has no place
        _point(text, at, f"{error.msg}; expected a formula as in 'softmax(x @ y, dim=-1)'")
    except (ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f"explain: {text[:40]!r} cannot be read ({error}); expected a formula.") from None
    reader = _Reader(text, names)
    try:
        function = reader.function(body)
    except RecursionError:
        raise UsageError(f"explain: {text[:40]!r} is nested too deeply; expected a formula.") from None
    linecache.cache[_FILE] = (len(text), None, [text + "\n"], _FILE)  # so that explanations can quote it
    # Only now, when nothing but names with shapes, numbers, operators and the functions above is left, is it compiled.
    # Torch imports parts of itself when they are first needed, by its caller's builtins.
    return eval(compile(function, _FILE, "eval"), {"__builtins__": {"__import__": __import__}, **reader.scope})


def expect_used(text: str, names: list[str]) -> None:
    """Refuse shapes of names that a formula does not have."""
    met = {node.id for node in ast.walk(ast.parse(text.strip(), mode="eval")) if isinstance(node, ast.Name)}
    if unused := [name for name in names if name not in met]:
        one = len(unused) == 1
        raise UsageError(
            f"explain: {', '.join(map(repr, unused))} {'has a shape but is' if one else 'have shapes but are'} not in "
            f"{text!r}; expected shapes for its own names only. Leave {'it' if one else 'them'} out."
        )


def _point(text: str, at: int, what: str) -> NoReturn:
    """Refuse a formula with a caret under the character that is to blame."""
    at = max(0, min(at, len(text)))
    start = max(0, at - 60)
    shown = ("..." if start else "") + text[start : start + 100]
    end = "" if what.endswith(("?", ".")) else "."
    raise UsageError(f"explain: {what}{end}\n  {shown}\n  {' ' * (at - start + (3 if start else 0))}^")


class _Reader:
    """Rebuilds a formula's tree from the allowed parts alone; `scope` has the functions it calls."""

    def __init__(self, text: str, names: list[str]) -> None:
        self.text, self.names, self.scope = text, names, dict[str, Any]()

    def function(self, body: ast.expr) -> ast.Expression:
        """The formula as a function of its names."""
        arguments = ast.arguments(
            posonlyargs=[], args=[ast.arg(n) for n in self.names], kwonlyargs=[], kw_defaults=[], defaults=[]
        )
        return ast.fix_missing_locations(ast.Expression(ast.Lambda(arguments, self.tensor(body))))

    def refuse(self, node: ast.AST, what: str) -> NoReturn:
        """Point at a part; of x.name at the name."""
        offset = getattr(node, "col_offset", 0)  # in bytes
        if isinstance(node, ast.Attribute):
            offset = (node.end_col_offset or 0) - len(node.attr.encode())
        _point(self.text, len(self.text.encode()[:offset].decode(errors="ignore")), what)

    def tensor(self, node: ast.expr) -> ast.expr:
        """A part that stands for a tensor or a number."""
        match node:
            case ast.BinOp(left=left, op=op, right=right) if isinstance(op, operators):
                return self._binary(node, self.tensor(left), op, self.tensor(right))
            case ast.UnaryOp(op=op, operand=operand) if isinstance(op, operators):
                return ast.UnaryOp(op, self.tensor(operand))
            case ast.Compare(left=left, ops=[op], comparators=[right]) if isinstance(op, comparisons):
                return ast.Compare(self.tensor(left), [op], [self.tensor(right)])
            case ast.Name(id=name):
                return self._name(node, name)
            case ast.Constant(value=value) if isinstance(value, (int, float)) and not isinstance(value, bool):
                return ast.Constant(value)
            case ast.Attribute(value=value, attr="T" | "mT"):
                return ast.Attribute(self.tensor(value), "mT", ast.Load())
            case ast.Subscript(value=value, slice=index):
                return ast.Subscript(self.tensor(value), self._index(index), ast.Load())
            case ast.Call():
                return self._call(node)
            case ast.Attribute(attr=attr):
                self.refuse(node, f"'.{attr}' is not part of a formula; expected .T, or a method as in x.sum(0)")
        part = ast.get_source_segment(self.text, node) or type(node).__name__
        self.refuse(node, f"{part!r} is not part of a formula; expected names, numbers, operators, functions")

    def _binary(self, node: ast.AST, left: ast.expr, op: ast.operator, right: ast.expr) -> ast.expr:
        """Powers of plain numbers are taken here, as floats, so that no formula can ask for an endless integer."""
        a, b = _number(left), _number(right)
        if not isinstance(op, ast.Pow) or a is None or b is None:
            return ast.BinOp(left, op, right)
        try:
            power = float(a) ** float(b)
        except (OverflowError, ZeroDivisionError) as error:
            self.refuse(node, f"this power is no number ({error.args[-1]})")
        if isinstance(power, complex):
            self.refuse(node, "this power is no real number")
        return ast.Constant(int(power) if power.is_integer() and abs(power) < 2**31 else power)

    def _name(self, node: ast.AST, name: str) -> ast.expr:
        if name in self.names:
            return ast.Name(name, ast.Load())
        if name in _words:
            return ast.Constant(_words[name])
        if name in functions:
            self.refuse(node, f"{name!r} is a function; expected its arguments in brackets, as in {name}(x)")
        known = f" {near_misses(name, sorted(self.names))}" if self.names else ""
        what = (
            f"{name!r} in {self.text!r} has no shape; expected one for each name. Add {name}=SIZES to --shapes.{known}"
        )
        self.refuse(node, what.rstrip("."))

    def _call(self, node: ast.Call) -> ast.expr:
        args = [self._argument(a) for a in node.args]
        keywords = []
        for k in node.keywords:
            if k.arg is None:
                self.refuse(k.value, "** is not part of a formula; expected keywords by name")
            keywords.append(ast.keyword(k.arg, self._argument(k.value)))
        dotted = ast.unparse(node.func)
        package, _, name = dotted.rpartition(".")
        if isinstance(node.func, ast.Name) or package in _packages:
            if name not in functions:
                self.refuse(node.func, f"there is no function {name!r}. {near_misses(name, sorted(functions))}")
            called = f"_{dotted.replace('.', '_')}"  # names of tensors may be those of functions
            while called in self.names:
                called = f"_{called}"
            self.scope[called] = _of_package.get(dotted) or functions[name]
            return ast.Call(ast.Name(called, ast.Load()), args, keywords)
        if isinstance(node.func, ast.Attribute):
            value = self.tensor(node.func.value)
            if name not in methods:
                self.refuse(node.func, f"there is no method {name!r}. {near_misses(name, sorted(methods))}")
            return ast.Call(ast.Attribute(value, name, ast.Load()), args, keywords)
        self.refuse(node.func, "this cannot be called; expected a function or a method")

    def _argument(self, node: ast.expr) -> ast.expr:
        """What a function may be given besides tensors: words, truth values, lists."""
        match node:
            case ast.Constant(value=value) if value is None or isinstance(value, (str, bool)):
                return ast.Constant(value)
            case ast.Tuple() | ast.List():
                return type(node)([self._argument(e) for e in node.elts], ast.Load())
        return self.tensor(node)

    def _index(self, node: ast.expr) -> ast.expr:
        """A slice, a position, None, ..., a list of positions, a mask, or several of them."""
        match node:
            case ast.Tuple(elts=elements):
                return ast.Tuple([self._index(e) for e in elements], ast.Load())
            case ast.Slice(lower=lower, upper=upper, step=step):
                return ast.Slice(*(None if end is None else self.tensor(end) for end in (lower, upper, step)))
            case ast.Constant(value=value) if value is None or value is Ellipsis:
                return ast.Constant(value)
        return self._argument(node)


def _number(node: ast.expr) -> float | None:
    """The value of a plain number."""
    match node:
        case ast.Constant(value=value) if isinstance(value, (int, float)):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand) if (inner := _number(operand)) is not None:
            return -inner
    return None
