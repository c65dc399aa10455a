"""Runs networks in PyTorch, torch.compile and onnxruntime, and takes the time."""

from __future__ import annotations

import copy
import io
import itertools
import logging
import math
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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pliant.cost import Example
from pliant.errors import ModelError, require

if TYPE_CHECKING:
    from pliant.latency.target import Target

Sampler = Callable[[], float]
"""Runs a network for a moment and returns the seconds of one pass."""

BUILT_IN = ("onnxruntime", "torch", "compile")
BLOCK = 2e-4  # seconds that one sample takes at least: long for a clock, short for a scheduler
WARM_UP = 3  # passes before the first that counts
COPIES = (4, 8)  # of a layer in a row, where they are small, and at most
CACHES = 2**24  # bytes: copies with large weights together fill what would keep them near
LARGE = 2**20  # bytes of weights that are large
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of axes


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
    made = [copy.deepcopy(layer) for _ in range(count)]
    devices = sorted({p.device.index for p in layer.parameters() if p.is_cuda})
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        for parameter in (p for each in made for p in each.parameters()):
            parameter.uniform_(-0.05, 0.05)
    return made


def sampler(models: Sequence[nn.Module], inputs: Example, target: Target) -> Sampler:
    """Make the sampler of one network, or of copies of a layer; its time is that of one of them.

    Raises:
        ModelError: the network cannot be run on the target.
        MissingExtraError: the runtime is not installed.
    """
    single = models[0] if len(models) == 1 else None
    model = single or Copies(models, added=target.runtime == "onnxruntime")
    try:
        with _current(target.device):
            go = _onnx(model, inputs, target) if target.runtime == "onnxruntime" else None
            go = go or _torch(model, inputs, target)
            inner = _warm_up(go)
    except (ImportError, ModelError):
        raise
    except Exception as error:  # runtimes have dozens of kinds of their own
        said = str(error).strip().splitlines()
        raise ModelError(
            f"{type(single or models[0]).__name__} must run on {target} to be measured, but fails "
            f"({type(error).__name__}: {said[0] if said else ''}): choose another target."
        ) from error
    passes = inner * len(models)
    if target.device.startswith("cuda"):
        return lambda: _on_cuda(go, inner, target.device) / passes
    return lambda: _seconds(go, inner) / passes


def batched(example: Example, rows: int) -> Any:
    """Repeat the first row of every tensor that has a batch axis."""
    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor) and leaf.dim()]
    size = len(tensors[0]) if tensors else 0

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


def _warm_up(go: Callable[[], Any]) -> int:
    """Run until caches are filled; return how many passes fill one sample."""
    went = min(_seconds(go, 1) for _ in range(WARM_UP))
    return max(1, math.ceil(BLOCK / max(went, 1e-9)))


def channels_last(tensor: Tensor) -> Tensor:
    """Put the channels of images and volumes, and of kernels for them, last in memory."""
    layout = CHANNELS_LAST.get(tensor.dim())
    return tensor if layout is None else tensor.contiguous(memory_format=layout)


def _torch(model: nn.Module, inputs: Example, target: Target) -> Callable[[], Any]:
    dtype = getattr(torch, target.dtype)

    def put(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.to(target.device, dtype if value.is_floating_point() else None)
        return channels_last(value)

    network: Any = copy.deepcopy(model).to(target.device, dtype).eval()
    for tensor in itertools.chain(network.parameters(), network.buffers()):
        tensor.data = channels_last(tensor.data)
    given = tree_map(put, inputs)
    if target.runtime == "compile":
        network = _compiled(network)

    def go() -> None:
        with _threads(target.threads), torch.inference_mode():
            _run(network, given)

    return go


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


def _onnx(model: nn.Module, inputs: Example, target: Target) -> Callable[[], Any]:
    require("onnx", "onnx")
    runtime = require("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads, options.inter_op_num_threads = target.threads, 1
    # The idle threads of one session must not take cores from the one that is measured.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    network, given = copy.deepcopy(model).cpu().float().eval(), on_cpu(inputs)
    graph = _graph(network, given)
    session = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    leaves = [leaf.numpy() for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    feed = dict(zip([each.name for each in session.get_inputs()], leaves, strict=False))
    if isinstance(given, Mapping):
        feed = {each.name: given[each.name].numpy() for each in session.get_inputs()}
    return lambda: session.run(None, feed)


def on_cpu(inputs: Example) -> Any:
    """Bring the tensors of an example to the CPU."""
    return tree_map(lambda v: v.cpu().contiguous() if isinstance(v, Tensor) else v, inputs)


def _graph(network: nn.Module, inputs: Any) -> bytes:
    """Write a network as ONNX, for nothing but its time.

    The exporter from TorchScript takes a tenth of the time of its successor, and onnxruntime runs
    both graphs equally fast; what it cannot write, the successor may.
    """
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs, None)
    names = list(kwargs) if kwargs else None
    with _quiet(), torch.no_grad():
        try:
            buffer = io.BytesIO()
            torch.onnx.export(
                network,
                args,
                buffer,  # type: ignore[arg-type]
                kwargs=kwargs,
                input_names=names,
                dynamo=False,
            )
            return buffer.getvalue()
        except Exception:  # anything at all: the other way is tried, and speaks for itself
            program = torch.onnx.export(network, args, kwargs=kwargs, dynamo=True, verbose=False)
            assert program is not None
            return bytes(program.model_proto.SerializeToString())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' progress and warnings to themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        logging.disable(before)
