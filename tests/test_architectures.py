"""What networks of other libraries do that plain ones do not: ask layers, take and give dicts."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.architectures import ARCHITECTURES
from bench.experiments import coverage, load
from pliant import compress
from pliant.data import Data
from pliant.edits import Factor, replay
from pliant.files.onnx import to_program


class Asking(nn.Module):
    """Pads by its convolution's geometry and casts to its type, as networks of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.to(self.conv.weight.dtype)
        x = F.pad(x, [self.conv.kernel_size[0] - self.conv.stride[0]] * 4)
        hidden = self.conv(x).mean((2, 3))
        return {"hidden": hidden, "logits": self.head(hidden.to(self.head.weight.device))}


class Words(nn.Module):
    """Reads ids with a mask and gives a dict; its attention is the fused one."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.mix = nn.Linear(16, 48)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        q, k, v = self.mix(self.words(input_ids)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        seen = attention_mask[:, None, None, :].bool()
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return {"logits": self.head(mixed.transpose(1, 2).reshape(*input_ids.shape, -1).mean(1))}


def ids(batch: int) -> dict[str, Tensor]:
    words = torch.randint(0, 20, (batch, 6), generator=torch.Generator().manual_seed(0))
    return {"input_ids": words, "attention_mask": torch.ones_like(words)}


def test_a_model_may_ask_a_factorized_layer_for_its_geometry_and_type() -> None:
    model, x = Asking().eval(), torch.randn(2, 3, 9, 9)
    wanted = model(x)
    replay(model, [Factor("conv", "tucker2", (3, 8)), Factor("head", "svd", (4,))])
    found = model(x)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in wanted)
    assert model.double()(x)["logits"].dtype == torch.float64  # the answer moves with the model
    assert set(dict(model.named_buffers())) == set()
    names = ["conv.reduce.weight", "conv.core.weight", "conv.expand.weight", "conv.expand.bias"]
    assert [name for name in model.state_dict() if name.startswith("conv")] == names


def test_inputs_by_name_and_outputs_by_name_go_all_the_way() -> None:
    torch.manual_seed(0)
    batches: Any = [ids(8), ids(8)]
    method = 'energy(form="auto", samples=16)'
    result = compress(Words().eval(), Data(train=batches), method, "params=0.8")
    assert result.report.met and result.edits
    to_program(result.model, ids(2))  # compares the outputs


def test_every_architecture_of_the_bench_has_a_row() -> None:
    rows = coverage.cells(load("coverage").settings)
    assert [cell.key["network"] for cell in rows] == list(ARCHITECTURES)
