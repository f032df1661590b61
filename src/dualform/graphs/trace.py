"""The one tracer: a function of tensors becomes a graph of the functional aten ops that a person wrote.

linear, einsum, layer_norm, softmax and scaled_dot_product_attention stay single nodes; in-place ops are rewritten;
randomness, data-dependent control flow and writes to inputs or buffers are refused with the caller's line.
"""

from __future__ import annotations

import inspect
import linecache
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor, fx
from torch.fx import traceback as fx_traceback
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dualform.graphs.complex_rules import paired
from dualform.graphs.constants import Constants, aside
from dualform.graphs.counts import Asked, asking, told
from dualform.graphs.ctc import SPELLED
from dualform.graphs.custom import Listener, Plain, listening
from dualform.graphs.draws import no_draws, refuse_random_ops
from dualform.graphs.edit import line_of
from dualform.graphs.functionalize import OWN_WRITES, functionalized
from dualform.graphs.hollow import CPU, Hollow, Hollows, blank, refusal
from dualform.graphs.recorder import CannotRecord, WritesOutside, record_as_called
from dualform.graphs.requiring import DATA, requires_grad, set_requires_grad, transforms
from dualform.graphs.selected import Proved, Selected, alone
from dualform.graphs.single_results import normalised
from dualform.graphs.survivors import Settled, Survivors, survivors
from dualform.graphs.this_thread import apart, caller, lines_told, uncompiled
from dualform.shapes import ShapeError, TraceError

aten = torch.ops.aten
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)(?:\n\s+(.*))?')
_LIBRARY = re.compile("/site-packages/(opt_einsum|numpy)/")
_TORCH = str(Path(torch.__file__).parent)
_CALLS = str(torch.nn.modules.module.__file__)
_PACKAGE = str(Path(__file__).parents[1])
_HERE = tuple(str(Path(_PACKAGE, n)) for n in ("algebra", "ops", "graphs", "explanations", "calculus"))
_doors: set[str] = set()  # files of ours that hand a user's function to the tracer


def trace(
    f: Callable[..., Any], *args: Tensor, known: Mapping[int, Tensor] = MappingProxyType({}),
    generators: Sequence[Any] = (), steps: bool = False,
    look: Callable[[fx.GraphModule], None] = lambda gm: None, asked: Asked | None = None, proved: Proved = alone,
) -> fx.GraphModule:  # fmt: skip
    """Trace a function of flat tensors into a graph of functional aten ops.

    gm(*args) == f(*args); closed-over tensors are attributes of gm (`get_attr` nodes, readable as gm.<target>); every
    node that makes a tensor has `meta["val"]`, a fake tensor; `source_line(node)` is the line of the caller's code.
    Every node makes one tensor: split, chunk and unbind are slices, max over a dim is argmax and gather. A complex
    tensor is two, its real and its imaginary part. gm.meta["read"]: tensors whose values the graph was made for,
    closed-over ones or of `known`: inputs, by position, that are constants; with steps, the args that masks are made of
    and that a mask picks by: the graph is for these masks. A gradient that f defines itself (an
    autograd.Function, a hook) is a node `kept`, whose derivative is that gradient. look: sees the graph as f calls it,
    before it is rewritten; what it writes into a node's meta stays where the node does. asked: is
    told what f asks of sizes, and decides by them. proved: proves that a graph keeps entries of its inputs apart, as
    many as a mask picks, and says where its results have them. generators: of random numbers, as
    `Fingerprint.generators` finds them; f may draw from none. The graph is for these shapes, dtypes and devices. A
    module goes through functional_call, its parameters *and buffers* among `args`, so that a write to one is noticed.
    Shape:  args: any tensors, fake ones too; the same tensor twice is two inputs.
    Dtype:  any; nothing is computed.
    Raises: TraceError for randomness, control flow that reads values, writes to inputs or closed-over tensors, and for
            anything else that cannot be traced.
    Example:
        >>> gm = trace(lambda x: x.clone().relu_(), torch.ones(2))
        >>> [node.target._opname for node in gm.graph.nodes if node.op == "call_function"]
        ['clone', 'relu']
    """
    code = getattr(f, "__code__", None)
    if code is not None and code.co_filename.startswith(_PACKAGE) and not code.co_filename.startswith(_HERE):
        _doors.add(code.co_filename)

    def made(record: Callable[..., fx.GraphModule]) -> tuple[fx.GraphModule, bool]:
        """Trace in one way; return whether the function found some of its own making."""
        with Survivors() as seen:
            try:
                gm = record(f, args, partial(Constants, known, _note, args if steps else ()), look, proved)
            except Exception as error:
                is_settled = error is seen.refused or isinstance(error, WritesOutside | Settled)
                try:  # while its frames say where it is from
                    _settle(error, error is seen.refused)
                finally:
                    seen.end(None, error, is_settled or record is not _recorded)
                raise
            return gm, seen.end(gm)

    def once() -> tuple[fx.GraphModule, bool]:
        try:
            return made(_recorded)
        except Settled:
            raise
        except Exception:  # whatever it is, torch's own tracer knows more, or says it better
            pass
        return made(_traced_by_torch)

    def run() -> fx.GraphModule:
        gm, has_more = once()
        return once()[0] if has_more else gm  # as the function is from now on, with tables that it has

    still = no_draws(generators, run, lambda at: _shown(at.f_code.co_filename, at.f_lineno, ""))
    before = caller.line
    with apart(), torch.enable_grad(), uncompiled(), still if generators else nullcontext(), asking(asked, _note):
        try:
            return run()
        finally:
            caller.line = before


def _recorded(
    f: Callable[..., Any], args: tuple[Tensor, ...], known: Callable[[], Constants], look: Any, proved: Proved
) -> fx.GraphModule:
    """Trace a function of plain ops, without torch's own tracer, whose first use takes a second."""
    constants, listener = known(), Plain(trace, _note, transforms())
    gm = record_as_called(_with_lines(f, constants, listener, proved), _names(f, len(args)), args)
    with Hollows():
        return _checked(gm, constants.read, look)


def _names(f: Callable[..., Any], count: int) -> list[str]:
    """Name a graph's inputs as torch's tracer does, after f's."""
    code = getattr(inspect.unwrap(f), "__code__", None)
    if code is None or code.co_flags & inspect.CO_VARARGS:
        return [f"arg{n}_1" for n in range(count)]
    return [f"{name}_1" for name in list(inspect.signature(f).parameters)[:count]]


def _traced_by_torch(
    f: Callable[..., Any], args: tuple[Tensor, ...], known: Callable[[], Constants], look: Any, proved: Proved
) -> fx.GraphModule:
    inputs, constants = [_standin(a) for a in args], known()
    mode = "real" if any(isinstance(a, torch._subclasses.FakeTensor) for a in args) else "fake"
    run = _with_lines(f, constants, Listener(trace, _note, transforms()), proved)
    # A graph's Python code is written when somebody runs it: most are only read.
    with _use_lazy_graph_module(True), _quiet("torch._subclasses.fake_tensor"), lines_told():
        try:
            gm = make_fx(run, pre_dispatch=True, tracing_mode=mode, _allow_non_fake_inputs=True)(*inputs)
        except (ShapeError, TraceError):
            raise
        except Exception as error:
            _reraise(error)
    return _checked(gm, constants.read, look)


def _checked(gm: fx.GraphModule, read: list[Tensor], look: Callable[[fx.GraphModule], None]) -> fx.GraphModule:
    """Refuse what a trace cannot hold, and bring the rest into one form."""
    look(gm)
    _refuse_values(gm)
    refuse_random_ops(gm, _blame)
    gm = paired(normalised(functionalized(gm, _blame)), _blame)
    gm.meta["read"] = read
    return gm


def _standin(value: Tensor) -> Tensor:
    """A tensor object of its own (make_fx merges identical ones) that no caller can see being written to."""
    if isinstance(value, Hollow):
        return blank(value, CPU)
    return value.detach().clone() if isinstance(value, Tensor) else value


class _Lines(TorchFunctionMode):
    """Write the caller's line into the nodes that a torch call makes, and listen to what is no op."""

    def __init__(self, constants: Constants, listener: Listener, proved: Proved) -> None:
        super().__init__()
        self.constants, self.listener, self.survivors = constants, listener, survivors()
        self.selected = Selected(_refuse_picked, listener.marked, trace, proved)
        self.refused: Exception | None = None  # what a tensor with numbers would have given

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        line = _note()
        _expect_unwritten(self.constants, line)
        result = self._taken(func, args, kwargs or {})
        self.survivors.note(result, line)
        self.constants.overwritten(small=True)  # to know what lies in what was read now
        return result

    def _taken(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What a call gives; where torch refuses it, whatever the numbers are, torch's own words."""
        try:
            result = self._called(func, args, kwargs)
        except Exception as error:
            if not isinstance(error, TraceError | CannotRecord):
                self._expect_taken(func, args, kwargs)
            self.refused = error
            raise
        if not isinstance(self.listener, Plain) and any(isinstance(x, Tensor) for x in pytree.tree_leaves(result)):
            self._expect_taken(func, args, kwargs)  # a fake tensor's kernel may let that pass
        return result

    def _expect_taken(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if func in _ASKED or not self.listener.sees((args, kwargs)):
            return
        with aside(), torch.random.fork_rng(devices=[]):
            self.survivors.refused = refusal(func, args, kwargs)
        if self.survivors.refused is not None:
            raise self.survivors.refused

    def _called(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if getattr(func, "__module__", "") == "torch._functorch.predispatch":
            func = self.listener.transform(func)
        if not self.listener.sees((args, kwargs)):
            self.selected.below()
            return self.listener.below(func, args, kwargs)
        if func in _ASKED:
            return _ASKED[func](self.listener, *args, **kwargs)
        self.selected.expect_booleans(func, args, kwargs, _note)
        values = self.constants.values(func, args, kwargs)
        call: Any = self.constants.call(func, args, kwargs)
        if isinstance(call, list):
            return call[0]
        to, own, named = self.selected.call(*call)
        result = (SPELLED.get(to) or to)(*own, **named)
        self.selected.note(func, args, kwargs, result)
        return told(func, self.constants.made(func, args, kwargs, self.listener.marked(to, own, named, result), values))


def _note() -> str:
    """Write the caller's line into the nodes that are made next; and give it as people read it, empty if none."""
    frame, inner, at, file, line, name = sys._getframe(1), None, None, "", "", "forward"
    while frame is not None and _is_ours(frame.f_code.co_filename, frame.f_code.co_name):
        if inner is None:  # a hook of torch's, as spectral_norm, is called beside forward
            at = frame if frame.f_code.co_filename != _CALLS else at
            inner = frame if frame.f_code.co_name in ("forward", "_call_impl") else None
        # Who asked a door for a trace has no line of the function.
        at_door = frame.f_code is trace.__code__ and getattr(frame.f_locals["code"], "co_filename", "") in _doors
        frame = None if at_door else frame.f_back
    if frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        line = linecache.getline(file, frame.f_lineno).strip()
    elif inner is not None and isinstance(module := inner.f_locals.get("self"), torch.nn.Module):
        # A part of torch's that is called by torch alone, as in nn.Sequential: the part says where.
        frame, line = at or inner, repr(module).partition("\n")[0]
        file = f"<torch>/{Path(frame.f_code.co_filename).name}"
    number = frame.f_lineno if frame else 0
    caller.line = f'File "{file}", line {number}, in {name}\n    {line}' if file else ""
    if caller.is_told:
        fx_traceback.current_meta["stack_trace"] = caller.line
    return _shown(file, number, line) if file else ""


def _expect_unwritten(constants: Constants, where: str = "") -> None:
    reader = constants.overwritten(small=bool(where))
    if reader is not None:
        before = f" (before `{where}`)" if where else ""
        raise Settled(
            f"trace: `{source_line(reader)}` reads memory that is written to later{before}, past torch's ops; "
            "expected a pure function of its inputs. Copy the array first: torch.tensor(array)."
        )


def _refuse(where: str, what: str, advice: str) -> NoReturn:
    raise TraceError(f"trace: `{where}` {what}; expected a pure function of its inputs. {advice}")


def _refused(what: str, advice: str) -> Callable[..., NoReturn]:
    return lambda *args, **kwargs: _refuse(_note(), what, advice)


def _grad_fn(listener: Listener, x: Tensor) -> None:
    if requires_grad(x):
        what = "reads how autograd made a tensor (grad_fn; a backward hook of a module does)"
        _refuse(_note(), what, "Ask h.requires_grad, or hook the tensor: h.register_hook(...).")


_flag = vars(torch._C.TensorBase)["requires_grad"]
_MEMORY = ("reaches a tensor's memory, past torch's ops", "Write h[...] = value, or compute the new value.")
_REACHING = "data_ptr storage untyped_storage __dlpack__ apply_ map_ map2_ set_ share_memory_"
# What a function asks of a tensor that is no op.
_ASKED: dict[Any, Callable[..., Any]] = {
    _flag.__get__: lambda listener, x: requires_grad(x),
    _flag.__set__: lambda listener, x, flag: set_requires_grad(x, flag),
    Tensor.requires_grad_: lambda listener, x, requires_grad=True: set_requires_grad(x, requires_grad),
    Tensor.register_hook: lambda listener, x, hook: listener.hook(x, hook),
    Tensor.grad_fn.__get__: _grad_fn,  # type: ignore[attr-defined]
    Tensor.retain_grad: lambda listener, x: None,
    Tensor.backward: _refused("writes gradients into .grad", "Use torch.autograd.grad, which gives them back."),
    Tensor.register_post_accumulate_grad_hook: _refused(
        "hooks the writing of .grad, which a gradient that is a value does not do", "Use h.register_hook."
    ),
    torch.autograd.grad: lambda listener, *args, **kwargs: listener.gradient(*args, **kwargs),
    DATA: lambda listener, x: x.detach(),
    # torch.distributions: are the arguments valid?
    torch._is_all_true: lambda listener, x: True,  # pyright: ignore[reportPrivateImportUsage]
    **dict.fromkeys((getattr(Tensor, name) for name in _REACHING.split()), _refused(*_MEMORY)),
    Tensor.data.__set__: _refused(  # type: ignore[attr-defined]
        "gives a tensor other memory (.data = ...)", "Use the new value, or h.copy_(...)."
    ),
}


def _with_lines(f: Callable[..., Any], constants: Constants, listener: Listener, proved: Proved) -> Callable[..., Any]:
    @wraps(f)  # the graph's inputs are named after f's
    def run(*args: Tensor) -> Any:
        with _Lines(constants, listener, proved) as lines, listening(listener, lines.selected):
            lines.survivors.begin(args, constants.released)
            listener.begin(args)
            constants.begin(args)
            result = f(*args)
            if lines.refused is not None:  # the function has caught it: on numbers there is nothing to catch
                raise lines.refused
            lines.selected.end(result)
            constants.end()
            _expect_unwritten(constants)
            return result

    return run


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Fake tensors log an error before they raise it; the caller sees it once, as a TraceError."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def source_line(node: fx.Node) -> str:
    """Name the line of the caller's code that made a node, as `h = x @ w   (mine.py:12)`; empty if it is not known.

    Shape:  none.
    Dtype:  none.
    Raises: nothing.
    """
    for file, line, _, text in reversed(_FRAME.findall(line_of(node))):
        if not _is_ours(file):
            return _shown(file, int(line), text)
    return ""


def _is_ours(file: str, name: str = "") -> bool:
    """Is a line no line of the caller's: torch's, the tracer's, or what fx and dataclasses wrote?"""
    if file == "<string>":
        return name in ("<lambda>", "__init__")
    return file.startswith((_TORCH, *_HERE, "<eval_with_key>")) or file in _doors or bool(_LIBRARY.search(file))


def _shown(file: str, line: int, text: str) -> str:
    code = (text or linecache.getline(file, line)).strip()
    return f"{code}   ({Path(file).name}:{line})" if code else f"({Path(file).name}:{line})"


def _blame(node: fx.Node, what: str, advice: str) -> NoReturn:
    _refuse(source_line(node) or str(node.target), what, advice)


def _refuse_picked() -> NoReturn:
    raise TraceError(
        f"trace: `{_note()}` reads a tensor's values (how many entries a mask picks, or one of them by another); "
        "expected a graph that is the same for all values: each picked entry, or row, worked on alone and put back "
        "under the same mask. Use torch.where(mask, new, old), or multiply by the mask."
    )


def _refuse_data(where: str) -> NoReturn:
    raise TraceError(
        f"trace: `{where}` reads a tensor's values (control flow, .item(), or a shape that depends on data); expected "
        "a graph that is the same for all values. Use torch.where or a mask instead."
    )


def _raised_at(error: Exception) -> str:
    """The caller's line that an error comes from."""
    frames = [fr for fr in traceback.extract_tb(error.__traceback__) if not _is_ours(fr.filename, fr.name)]
    if frames:
        return _shown(frames[-1].filename, frames[-1].lineno or 0, frames[-1].line or "")
    parts = _parts(error)
    return repr(parts[-1]).partition("\n")[0] if parts else "the function"


def _parts(error: Exception) -> list[torch.nn.Module]:
    """The modules in whose forward an error came up."""
    called = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "forward"]
    return [x for frame in called if isinstance(x := frame.f_locals.get("self"), torch.nn.Module)]


def _settle(error: Exception, is_torchs: bool) -> None:
    """Refuse for good what torch's own tracer would run, or say worse."""
    if isinstance(error, WritesOutside):
        advice = OWN_WRITES
        if any(getattr(part, "track_running_stats", False) for part in _parts(error)):
            advice = (
                "Build it with track_running_stats=False, which keeps none, or call .eval(), which takes those kept."
            )
        raise Settled(
            f"trace: `{_raised_at(error)}` writes to an input or a buffer; expected a pure function of its inputs. "
            f"{advice}"
        ) from None
    if is_torchs:
        _reraise(error, Settled)


def _reraise(error: Exception, kind: type[TraceError] = TraceError) -> NoReturn:
    where, text = _raised_at(error), str(error)
    reads = ("DataDependent", "DynamicOutputShape")
    told = ("get value out of a tracing tensor", "expected to contain only concrete integers")
    if any(word in type(error).__name__ for word in reads) or any(words in text for words in told):
        _refuse_data(where)
    if "TorchScript interpreter" in text:
        raise TraceError(
            f"trace: `{where}` runs TorchScript, which a trace cannot look into; expected Python. Use the module or "
            "the function that it was scripted or traced from."
        ) from error
    if "does not require grad" in text:
        raise TraceError(
            f"trace: `{where}` takes a gradient of a tensor without one, or by another way than a value; expected "
            "plain tensor ops. Use torch.autograd.grad of what depends on an input, or differentiate the function from "
            "outside."
        )
    if "read-only" in text:
        _refuse(where, *_MEMORY)
    if "tensor subclasses" in text:
        raise TraceError(
            f"trace: `{where}` leaves torch; expected tensor ops. Write it with torch, or compute that part outside."
        ) from error
    reason = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
    raise kind(
        f"trace: `{where}` failed with {reason}; expected a function that runs on these shapes. "
        "Run it on real tensors to see the whole error."
    ) from error


def _refuse_values(gm: fx.GraphModule) -> None:
    """A number that came out of a tensor, or a shape that depends on its values, is control flow in disguise."""
    for node in gm.graph.nodes:
        for part in pytree.tree_leaves(node.meta.get("val")):
            loose = isinstance(part, Tensor) and not all(isinstance(n, int) for n in part.shape)
            if loose or isinstance(part, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                _refuse_data(source_line(node) or str(node.target))
