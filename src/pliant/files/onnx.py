"""Other formats for a compressed network, with the outputs compared after writing."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import BytesIO, StringIO
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from pliant.codecs.container import check_replaceable, path_of
from pliant.cost import Example, bare, call, call_alike, twin
from pliant.errors import ArtifactError, ModelError, OutputError, must_be, require
from pliant.files.qdq import deployable, narrowed
from pliant.files.traceable import coarse, four_axes, traceable, written
from pliant.nn.coded import decoded
from pliant.observe.outputs import answers

ONE_FILE = 2 * 1000**3  # bytes; protobuf ends at 2 GiB, so larger weights lie beside the graph
NARROW_OPSET = 21  # the first with integers of 4 bits
BATCHES = (1, 3)  # sizes to compare at: none is the size that is traced


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compares with the network it was made from.

    Attributes:
        path: the ONNX file; weights of 2 GB and more are beside it, in ``path`` + ``.data``.
        max_difference: largest absolute difference of any output, over batches of 1 and 3.
        bytes: size of what was written.
        opset: version of the operators.
    """

    path: Path
    max_difference: float
    bytes: int
    opset: int


def to_onnx(
    model: nn.Module,
    path: str | Path,
    example: Example,
    *,
    opset: int | None = None,
    tolerance: float = 1e-4,
) -> Exported:
    """Write a network as ONNX with any batch size, and compare it with onnxruntime.

    The network is exported in eval mode from a copy on the CPU; the given one stays as it is.
    Quantized layers are written with QuantizeLinear and DequantizeLinear, so that a runtime can
    compute them in integers.

    Args:
        model: plain modules only.
        path: where to; an earlier ONNX file is replaced, once the new one agrees, and a file of
            another kind is refused.
        example: inputs of one forward call: a tuple, or a mapping of keyword arguments. The
            first axis of every tensor that is as long as the first tensor's is the batch.
        opset: version of the operators; PyTorch's choice if None.
        tolerance: largest absolute difference of outputs that is accepted; at least a twentieth
            of the largest output where activations are rounded, and two levels of them: a number
            between two levels may fall to either side. Of networks in 16 bits at least eight
            times the precision of their numbers.

    Raises:
        MissingExtraError: onnx, onnxscript or onnxruntime are not installed.
        ModelError: the network cannot be exported.
        ArtifactError: the outputs differ by more than the tolerance; nothing is written.
        OutputError: a file of another kind is there, or the file cannot be written.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "onnx")
    path = path_of(path)
    must_be(Real, "tolerance", tolerance, ModelError, "a number")
    check_replaceable(path, "ONNX", _is_onnx)
    model = bare(model)
    network, batch = _prepared(model, example)
    args, kwargs = ((), dict(batch)) if isinstance(batch, Mapping) else (batch, None)
    if args and isinstance(args[-1], dict):
        args = (*args, {})  # the last one would be read as arguments by name
    traced = twin(network)
    needs = deployable(traced)
    if apart := max(needs.apart, coarse(network)):
        tolerance = max(tolerance, apart * _largest(_outputs(network, batch)))
    traceable(traced, batch)
    with _exporting(model, "ONNX"), _quiet():
        program = torch.onnx.export(
            traced,
            args,
            kwargs=kwargs,
            dynamic_shapes=_dynamic(batch),
            opset_version=opset or (NARROW_OPSET if needs.narrow else None),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    written_for = program.model.opset_imports[""]
    if opset not in (None, written_for):
        raise ModelError(
            f"{type(model).__name__} was asked for in opset {opset}, but PyTorch can only write "
            f"{written_for}: leave opset out, or take a newer one."
        )
    if needs.narrow and written_for >= NARROW_OPSET:
        narrowed(program.model)
    size = sum(t.nbytes for t in (*traced.parameters(), *traced.buffers()))
    with _into(path) as temporary:
        with _quiet():
            program.save(temporary, external_data=size >= ONE_FILE)
        difference = _compare_onnx(network, temporary, example)
        _accept(network, difference, tolerance, "onnxruntime", batch)
        written = sum(file.stat().st_size for file in temporary.parent.iterdir())
    return Exported(path, difference, written, written_for)


def to_program(
    model: nn.Module, example: Example, path: str | Path | None = None, *, tolerance: float = 1e-5
) -> ExportedProgram:
    """Capture a network as a PyTorch program with any batch size, checked for equal outputs.

    Args:
        model: plain modules only; it stays as it is, the program is in eval mode on the CPU.
        example: as for `to_onnx`.
        path: where to write it too, as ``.pt2``; an earlier one is replaced, and a file of
            another kind is refused. That is PyTorch's own format, read by ``torch.export.load``;
            open only files that you trust.
        tolerance: largest absolute difference of outputs that is accepted.

    Raises:
        ModelError: the network cannot be exported.
        ArtifactError: the outputs differ by more than the tolerance.
        OutputError: a file of another kind is there, or the file cannot be written.
    """
    if path is not None:
        check_replaceable(path_of(path), ".pt2", _is_program)
    network, batch = _prepared(model, example)
    args, kwargs = ((), dict(batch)) if isinstance(batch, Mapping) else (batch, None)
    traceable(traced := twin(network), batch)
    with _exporting(model, "a program"), _quiet():
        program = torch.export.export(traced, args, kwargs, dynamic_shapes=_dynamic(batch))
    captured = program.module()
    differences = [
        _difference(_outputs(network, inputs), _outputs(captured, inputs))
        for inputs in (_resized(example, rows) for rows in BATCHES)
    ]
    _accept(network, max(differences), tolerance, "torch.export", batch)
    if path is not None:
        buffer = BytesIO()  # PyTorch's own writer hides why a disk refuses
        with _quiet():
            torch.export.save(program, buffer)
        with _into(Path(path)) as temporary:
            temporary.write_bytes(buffer.getbuffer())
    return program


# ---------------------------------------------------------------- the network and its inputs


def _prepared(model: nn.Module, example: Example) -> tuple[nn.Module, Any]:
    """Copy the network and make a batch of two that it runs on: ones are often special."""
    name, batch = type(model).__name__, _resized(example, 2)
    try:
        network = twin(decoded(model)).cpu().eval()
    except Exception as error:  # a model's own attributes may refuse to be copied in any way
        raise ModelError(
            f"{name} must be copied before it is exported, and cannot ({_first_line(error)}): "
            "remove what copy.deepcopy fails on."
        ) from error
    try:
        _outputs(network, batch)
    except Exception as error:
        raise ModelError(
            f"{name} must run on the example before it is exported, but fails "
            f"({_first_line(error)}): give an example that it accepts in batches of 2."
        ) from error
    return network, batch


def _resized(example: Example, rows: int) -> Any:
    """Repeat an example to this many rows on the CPU; each repetition is rolled by a place."""
    length = _length(example)

    def resize(value: Any) -> Any:
        if not _has_batch(value, length):
            return value.cpu() if isinstance(value, Tensor) else value
        picked = [value[row % length].cpu() for row in range(rows)]
        return torch.stack([_rolled(picked[row], row // length) for row in range(rows)])

    return tree_map(resize, dict(example) if isinstance(example, Mapping) else example)


def _rolled(row: Tensor, places: int) -> Tensor:
    return row.roll(places, -1) if row.dim() else row


def _length(example: Example) -> int:
    sizes = [len(leaf) for leaf in tree_leaves(example) if isinstance(leaf, Tensor) and leaf.dim()]
    if not sizes or not sizes[0]:
        raise ModelError(
            "An export needs the inputs of one forward call, with at least one tensor whose "
            "first axis is the batch: give example=(inputs,)."
        )
    return sizes[0]


def _has_batch(value: Any, length: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == length


def _dynamic(batch: Any) -> Any:
    """Name the batch axis of every tensor that has one, in the shape of the inputs."""
    axis, length = Dim("batch"), _length(batch)
    return tree_map(lambda value: {0: axis} if _has_batch(value, length) else None, batch)


# ---------------------------------------------------------------- exporting


@contextmanager
def _exporting(model: nn.Module, kind: str) -> Iterator[None]:
    """Turn the pages that an exporter writes about a failure into one sentence.

    Attention is traced as the products it is: the fused one returns strides of its own, which
    cannot be followed for a batch of unknown size.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH), four_axes():
            yield
    except Exception as error:
        cause = error
        while isinstance(cause.__cause__, Exception):
            cause = cause.__cause__
        raise ModelError(
            f"{type(model).__name__} cannot be exported as {kind} for any batch size "
            f"({type(cause).__name__}: {_first_line(cause)}): its forward must be free of "
            "choices that depend on values of tensors or on the size of the batch."
        ) from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else "no message"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what exporters print and log about their own progress."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # PyTorch gives its loggers levels of their own
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _is_onnx(path: Path) -> bool:
    """An ONNX file has no signature, but its first field is always its version."""
    try:
        with path.open("rb") as stream:
            return stream.read(1) == b"\x08"
    except OSError:
        return False


def _is_program(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/archive_format") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


@contextmanager
def _into(path: Path) -> Iterator[Path]:
    """Yield a path of the same name in a new folder; its files move here if all goes well.

    The name must be the same, since a large ONNX file refers to the file of its weights by name.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            yield Path(folder) / path.name
            for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
                os.replace(file, path.with_name(file.name))
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error.strerror or error}): make room, or choose a "
            "folder that exists and is yours to write to."
        ) from error


# ---------------------------------------------------------------- comparing


def _why_not_run(network: nn.Module, error: Exception) -> str:
    """Say what may keep onnxruntime from running a network."""
    if any(p.dtype == torch.bfloat16 for p in network.parameters()):
        return "on CPUs it computes little in bfloat16: export model.float()"
    if any(getattr(module, "proj_size", 0) for module in network.modules()):
        return "an LSTM with proj_size has no operator in ONNX: write it with LSTMCell"
    if "NOT_IMPLEMENTED" in str(error) or "bfloat16" in str(error):
        return "on CPUs it computes little in bfloat16: export without autocast in its forward"
    return "its forward may be bound to one size of batch, or its batch lie on another axis"


def _compare_onnx(network: nn.Module, path: Path, example: Example) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, torch.get_num_threads()
    worst = 0.0
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]
        for rows in BATCHES:
            inputs = _resized(example, rows)
            found = session.run(None, _feed(names, inputs))
            worst = max(worst, _difference(_outputs(network, inputs), map(torch.as_tensor, found)))
    except Exception as error:  # onnxruntime has a dozen kinds of its own
        raise ArtifactError(
            f"The exported {type(network).__name__} must run in onnxruntime, but fails "
            f"on batches of 1 and 3 ({_first_line(error)}): nothing was written; "
            f"{_why_not_run(network, error)}."
        ) from error
    return worst


def _feed(names: list[str], inputs: Any) -> dict[str, Any]:
    if isinstance(inputs, Mapping) and set(names) <= set(inputs):
        return {name: inputs[name].numpy() for name in names}
    tensors = [leaf.numpy() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return dict(zip(names, tensors, strict=True))


def _outputs(network: Any, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        leaves = tree_leaves(written(call(network, inputs)))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _largest(outputs: list[Tensor]) -> float:
    """The largest finite number."""
    return max(
        (float(o.nan_to_num(0.0, 0.0, 0.0).abs().max()) for o in outputs if o.numel()), default=0.0
    )


def _difference(wanted: Any, found: Any) -> float:
    """The largest absolute difference; infinite where shapes or numbers make no sense.

    Infinities of one sign are equal, as masked scores are, and so is what is no number in both.
    """
    worst = 0.0
    for mine, other in zip(wanted, found, strict=True):
        if mine.shape != other.shape:
            return float("inf")
        if mine.numel():
            one, two = mine.double(), other.double()
            same = (one == two) | (one.isnan() & two.isnan())
            gap = float((one - two).abs().masked_fill(same, 0.0).max())
            worst = max(worst, gap if gap == gap else float("inf"))
    return worst


def _accept(
    model: nn.Module, difference: float, tolerance: float, runtime: str, batch: Any
) -> None:
    if not difference <= tolerance:
        with torch.no_grad():
            draws = [answers(call_alike(model, batch, seed)) for seed in range(2)]
        if not all(map(torch.equal, *draws)):
            raise ArtifactError(
                f"The exported {type(model).__name__} cannot be compared: it draws random numbers "
                "in evaluation, so no two calls agree; give these numbers as an input."
            )
        raise ArtifactError(
            f"The exported {type(model).__name__} must give the same outputs, but under {runtime} "
            f"they differ by up to {difference:.3g} where {tolerance:g} is allowed: nothing was "
            "written; a model with very large outputs may need a larger tolerance."
        )
