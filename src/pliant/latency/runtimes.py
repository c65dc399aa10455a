"""Runs networks in PyTorch, torch.compile and onnxruntime, and takes the time."""

from __future__ import annotations

import io
import itertools
import logging
import math
import os
import re
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
)
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from pliant.cost import Example, tensors, twin
from pliant.errors import ModelError, require
from pliant.math.alone import forked

Sampler = Callable[[], float]
"""Runs a network for a moment and returns the seconds of one pass."""

Build = Callable[[], Callable[[], Any]]
"""Makes what runs a network once, in memory of its own each time."""

BUILT_IN = ("onnxruntime", "torch", "compile")
BLOCK = 2e-4  # seconds that one sample takes at least: long for a clock, short for a scheduler
WARM_UP = 3  # passes before the first that counts
SHORT = 1e-3  # seconds of a pass in which it shows where in memory a network lies
COPIES = (4, 8)  # of a layer in a row, where they are small, and at most
CACHES = 2**24  # bytes: copies with large weights together fill what would keep them near
LARGE = 2**20  # bytes of weights that are large
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of axes
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # colours of a terminal


class Settings(Protocol):
    """What a runtime must know of a target: see `pliant.latency.Target`."""

    @property
    def runtime(self) -> str:
        """Its name."""

    @property
    def threads(self) -> int:
        """Of one inference."""

    @property
    def dtype(self) -> str:
        """Of weights and inputs."""

    @property
    def device(self) -> str:
        """Where the network lies."""


class Copies(nn.Module):
    """Copies of one layer that read the same input, each with weights of its own.

    A runtime that fuses an addition into a convolution keeps its inner layout when the outputs
    are added; PyTorch would pay for additions, so there they are only returned.
    """

    def __init__(self, layers: Sequence[nn.Module], *, added: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.added = added

    def forward(self, *inputs: Tensor) -> Any:
        """Run all of them."""
        outputs = [layer(*inputs) for layer in self.layers]
        return sum(outputs[1:], outputs[0]) if self.added else outputs


def copies_of(layer: nn.Module) -> list[nn.Module]:
    """Copy a layer with other weights, as often as a measurement needs."""
    size = sum(t.nbytes for t in layer.parameters())
    count = COPIES[0] if size < LARGE else max(2, min(COPIES[1], CACHES // size))
    made = [twin(layer) for _ in range(count)]
    devices = sorted({p.device.index for p in layer.parameters() if p.is_cuda})
    with torch.no_grad(), forked(devices):
        for parameter in (p for each in made for p in each.parameters()):
            parameter.uniform_(-0.05, 0.05)
    return made


def samplers(
    models: Sequence[nn.Module], inputs: Example, target: Settings, builds: int = 1
) -> list[Sampler]:
    """Make samplers of one network, or of copies of a layer; their time is that of one of them.

    Args:
        models: the network alone, or the copies.
        inputs: of one forward call.
        target: where it runs.
        builds: how often a short network is built anew. Its time depends on where in memory its
            tensors come to lie; that of a long one does not, and compiling twice takes too long.

    Raises:
        ModelError: the network cannot be run on the target.
        MissingExtraError: the runtime is not installed.
    """
    single = models[0] if len(models) == 1 else None
    model = single or Copies(models, added=target.runtime == "onnxruntime")
    try:
        with _current(target.device):
            make = _onnx if target.runtime == "onnxruntime" else _torch
            build = make(model, inputs, target)
            first = build()
            took = _warm_up(first)
            more = builds - 1 if took < SHORT and target.runtime != "compile" else 0
            built = [first, *(build() for _ in range(more))]
    except (ImportError, ModelError):
        raise
    except Exception as error:  # runtimes have dozens of kinds of their own
        _check_runs(models[0], inputs)
        raise ModelError(
            f"{type(models[0]).__name__} must run on {target} to be measured, but fails "
            f"({_cause(error)}): choose another target."
        ) from error
    inner = max(1, math.ceil(BLOCK / max(took, 1e-9)))  # passes that fill one sample
    passes = inner * len(models)

    def timed(go: Callable[[], Any]) -> Sampler:
        if target.device.startswith("cuda"):
            return lambda: _on_cuda(go, inner, target.device) / passes
        return lambda: _seconds(go, inner) / passes

    return [timed(go) for go in built]


def _check_runs(model: nn.Module, inputs: Example) -> None:
    """Refuse a network that PyTorch itself cannot run: no target is at fault.

    Raises:
        ModelError: it does not run on these inputs.
    """
    try:
        with torch.inference_mode():
            _run(*_in_float32(model, inputs))
    except Exception as error:  # a network may raise anything
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors(inputs))
        raise ModelError(
            f"{type(model).__name__} does not run on inputs of shapes {shapes} ({_cause(error)}): "
            "give an example that it takes; networks are compared on the same inputs."
        ) from error


def _cause(error: BaseException) -> str:
    """Say in one line what was first to fail; exporters wrap it into pages."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in ESCAPES.sub("", str(error)).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.:')}" if lines else type(error).__name__


def batched(example: Example | Tensor, rows: int) -> Any:
    """Repeat the first row of every tensor that has a batch axis."""
    example = (example,) if isinstance(example, Tensor) else example
    found = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor) and leaf.dim()]
    size = len(found[0]) if found else 0

    def resize(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or len(value) != size:
            return value
        return value[:1].repeat(rows, *(1,) * (value.dim() - 1))

    return tree_map(resize, example if isinstance(example, Mapping) else tuple(example))


def _seconds(go: Callable[[], Any], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        go()
    return time.perf_counter() - began


def _current(device: str) -> AbstractContextManager[Any]:
    """Make a CUDA device the current one: events, and waiting for them, name no device."""
    return torch.cuda.device(device) if device.startswith("cuda") else nullcontext()


def _on_cuda(go: Callable[[], Any], times: int, device: str) -> float:
    """Time work on a CUDA device between two events of its own clock."""
    with _current(device):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(times):
            go()
        last.record()
        torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def _warm_up(go: Callable[[], Any]) -> float:
    """Run until caches are filled; return the seconds of one pass."""
    return min(_seconds(go, 1) for _ in range(WARM_UP))


def channels_last(tensor: Tensor) -> Tensor:
    """Put the channels of images and volumes, and of kernels for them, last in memory."""
    layout = CHANNELS_LAST.get(tensor.dim())
    return tensor if layout is None else tensor.contiguous(memory_format=layout)


def _torch(model: nn.Module, inputs: Example, target: Settings) -> Build:
    dtype = getattr(torch, target.dtype)

    def put(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.to(target.device, dtype if value.is_floating_point() else None)
        return channels_last(value)

    def build() -> Callable[[], Any]:
        network: Any = twin(model).to(target.device, dtype).eval()
        for tensor in itertools.chain(network.parameters(), network.buffers()):
            tensor.data = channels_last(tensor.data)
        given = tree_map(put, inputs)
        if target.runtime == "compile":
            network = _compiled(network)

        def go() -> None:
            with _threads(target.threads), torch.inference_mode():
                _run(network, given)

        return go

    return build


def _run(network: Callable[..., Any], given: Any) -> Any:
    """Call what may be no module, with inputs that are where they belong."""
    return network(**given) if isinstance(given, Mapping) else network(*given)


def _compiled(network: nn.Module) -> Callable[..., Any]:
    """Compile a network as code of its own.

    The compiler counts by code: what it has compiled eight times it runs uncompiled from then on,
    and all copies of layers, like all variants of a network, share one `forward`.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return network(*args, **kwargs)

    own = types.FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)
    compiled: Callable[..., Any] = torch.compile(own)
    return compiled


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _onnx(model: nn.Module, inputs: Example, target: Settings) -> Build:
    require("onnx", "onnx")
    runtime = require("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads, options.inter_op_num_threads = target.threads, 1
    # The idle threads of one session must not take cores from the one that is measured.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    network, given = _in_float32(model, inputs)
    with torch.no_grad():
        wanted = [tuple(tensor.shape) for tensor in tensors(_run(network, given))]
    flat = _Flat(network, given)
    feed = {name: tensor.numpy() for name, tensor in zip(flat.names, flat.inputs, strict=True)}

    def ready(graph: bytes) -> Callable[[], Any]:
        session = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        taken = {each.name: feed[each.name] for each in session.get_inputs()}
        found = [value.shape for value in session.run(None, taken)]
        if found[: len(wanted)] != wanted:  # behind them may come what only exporters unpack
            raise ModelError(
                f"The ONNX graph of {type(network).__name__} must give outputs of shapes {wanted} "
                f"as the network does, not {found}: choose another target."
            )
        return lambda: session.run(None, taken)

    def checked(graph: bytes) -> Build:
        first = [ready(graph)]
        return lambda: first.pop() if first else ready(graph)

    # The exporter from TorchScript takes a tenth of the time of its successor, and onnxruntime
    # runs both graphs equally fast; what it cannot write, or writes wrongly, the successor may.
    try:
        return checked(_scripted(flat))
    except Exception:  # anything at all: the other way is tried, and speaks for itself
        return checked(_traced(flat))


def on_cpu(inputs: Example) -> Any:
    """Bring the tensors of an example to the CPU."""
    return tree_map(lambda v: v.cpu().contiguous() if isinstance(v, Tensor) else v, inputs)


def _in_float32(model: nn.Module, inputs: Example) -> tuple[nn.Module, Any]:
    """Copy a network and its inputs to the CPU."""

    def put(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    return twin(model).cpu().float().eval(), tree_map(put, on_cpu(inputs))


class _Flat(nn.Module):
    """Takes the tensors of an example by position, and nothing else.

    An exporter that sees the network's own signature makes inputs of its defaults as well.
    """

    def __init__(self, network: nn.Module, given: Any) -> None:
        super().__init__()
        self.network = network
        self.leaves, self.spec = tree_flatten(given)
        self.places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        self.inputs = tuple(self.leaves[place] for place in self.places)
        self.names = [f"input_{place}" for place in self.places]

    def forward(self, *inputs: Tensor) -> Any:
        """Run the network."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, inputs, strict=True):
            leaves[place] = tensor
        return _run(self.network, tree_unflatten(leaves, self.spec))


def _scripted(flat: _Flat) -> bytes:
    buffer: Any = io.BytesIO()
    with _quiet(), _muted(), torch.no_grad():
        torch.onnx.export(flat, flat.inputs, buffer, input_names=flat.names, dynamo=False)
    return bytes(buffer.getvalue())


def _traced(flat: _Flat) -> bytes:
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            flat, flat.inputs, input_names=flat.names, dynamo=True, verbose=False
        )
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' progress and warnings to themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # what fails is told by the exception
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        logging.disable(before)


@contextmanager
def _muted() -> Iterator[None]:
    """Drop what is written to the process's own output: the older exporter prints below Python."""
    try:
        kept = os.dup(1)
    except OSError:  # there is none, as in a service
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
