"""Who else multiplies small integers: PyTorch's int8 product, onnxruntime's MatMulNBits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.errors import require

TORCH, NBITS = "PyTorch int8", "onnxruntime MatMulNBits"
BLOCK = 32  # of depth, with a scale each: onnxruntime's own default
OPSET = 21


@dataclass(frozen=True)
class Rival:
    """One way to multiply codes.

    Args:
        multiply: takes the codes of the left matrix, (rows, depth).
        bytes: of the right matrix with all that belongs to it.
    """

    multiply: Callable[[Tensor], Tensor]
    bytes: int


def rivals(right: Tensor) -> dict[str, Rival]:
    """Prepare the right matrix, (columns, depth) of codes from 0 to 15, for everyone."""
    return {TORCH: _int8(right), NBITS: _nbits(right)}


def _int8(right: Tensor) -> Rival:
    """`torch._int_mm` takes depths and columns in eights; codes are filled up with zeros."""
    columns, depth = right.shape
    full = torch.nn.functional.pad(right, (0, -depth % 8, 0, -columns % 8)).to(torch.int8)
    other = full.T.contiguous()

    def multiply(left: Tensor) -> Tensor:
        filled = torch.nn.functional.pad(left, (0, -depth % 8, 0, max(0, 17 - len(left))))
        return torch._int_mm(filled.to(torch.int8), other)[: len(left), :columns]

    return Rival(multiply, right.numel())


def _nbits(right: Tensor) -> Rival:
    columns, depth = right.shape
    blocks = -(-depth // BLOCK)
    full = torch.nn.functional.pad(right, (0, blocks * BLOCK - depth))
    packed = (full[:, 0::2] | full[:, 1::2] << 4).view(columns, blocks, BLOCK // 2)
    constants = {
        "B": packed.numpy(),
        "scales": torch.ones(columns * blocks).numpy(),
        "zeros": torch.zeros(columns * -(-blocks // 2), dtype=torch.uint8).numpy(),
    }
    session = _session(constants, depth, columns)

    def multiply(left: Tensor) -> Tensor:
        return torch.as_tensor(session.run(None, {"A": left.float().numpy()})[0])

    return Rival(multiply, sum(value.nbytes for value in constants.values()))


def _session(constants: dict[str, Any], depth: int, columns: int) -> Any:
    onnx, runtime = require("onnx", "onnx"), require("onnxruntime", "onnx")
    make, kind = onnx.helper, onnx.TensorProto.FLOAT
    node = make.make_node(
        *("MatMulNBits", ["A", *constants], ["Y"]),
        domain="com.microsoft",
        **{"K": depth, "N": columns, "bits": 4, "block_size": BLOCK},
    )
    graph = make.make_graph(
        [node],
        "product",
        [make.make_tensor_value_info("A", kind, ["rows", depth])],
        [make.make_tensor_value_info("Y", kind, ["rows", columns])],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [make.make_opsetid("", OPSET), make.make_opsetid("com.microsoft", 1)]
    model = make.make_model(graph, opset_imports=opsets, ir_version=10)
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    return runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
