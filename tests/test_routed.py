"""Routed layers: experts that see no token of a batch, or none of the first sample."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant.edits import Quantize
from pliant.families.quantize.levels import begun
from pliant.families.quantize.samples import Shown
from pliant.families.quantize.tunable import tunable
from pliant.families.quantize.tuning import (
    Goal,
    Rates,
    _loss,
    block_errors,
    correct,
    independent,
)
from pliant.surgery.batchnorm import recalibrate
from pliant.surgery.prove import cuttable


class Routed(nn.Module):
    """Every token goes to the expert that its scores prefer, the last expert gets none."""

    def __init__(self, *, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        self.first, self.router, self.head = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 3)
        nn.init.constant_(self.router.bias[-1:], -100.0)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        best, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (best == number).nonzero()[:, 0]
            if len(rows) or not self.skip:
                out = out.index_add(0, rows, expert(x[rows]))
        return self.head(out)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    "method",
    ["groupwise_ptq(independent=2, joint=2)", "int4_gemm", "magnitude", "energy(samples=32)"],
)
def test_methods_take_experts_without_tokens(method: str, *, skip: bool) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 8), torch.randint(0, 3, (64,))
    budget = None if "ptq" in method or "int4" in method else "params=0.9"
    result = pliant.compress(Routed(skip=skip), (x, y), method, budget)
    assert result.report.met
    assert all(p.isfinite().all() for p in result.model.parameters())
    assert result.model(x).isfinite().all()


def test_an_expert_that_gets_no_token_leaves_biases_and_errors_numbers() -> None:
    torch.manual_seed(0)
    teacher = Routed(skip=False)
    student, batches = copy.deepcopy(teacher), [Shown((torch.randn(16, 8),))]
    edit = Quantize("experts.3.0", 4, 1, indexed=False)
    tunable(student, {"experts.3.0": (edit.written, begun(teacher, edit, "contiguous", None))})
    correct(teacher, student, [batch.inputs for batch in batches])
    assert student.experts[3][0].layer.bias.isfinite().all()
    assert block_errors(teacher, student, ["experts.3"], batches) == {"experts.3": 0.0}
    rates = Rates(0.1, 0.1)
    given = iter(batches * 3)
    independent(teacher, student, ["experts.3"], given, steps=2, rates=rates, held=batches)
    assert all(p.isfinite().all() for p in student.parameters())


def test_a_block_is_compared_with_itself_where_student_and_teacher_call_others() -> None:
    """Blocks that the student does not call leave the others with their own targets."""
    torch.manual_seed(0)
    teacher = Routed(skip=True)
    student, x = copy.deepcopy(teacher), Shown((torch.randn(16, 8),))
    blocks = [f"experts.{i}" for i in range(4)]
    best = int(teacher.router(teacher.first(x.inputs[0]).relu()).argmax(-1)[0])
    nn.init.constant_(student.router.bias[best : best + 1], -100.0)  # its tokens go elsewhere
    loss, error = _loss(teacher, student, blocks, Goal(answers=0.0), x)
    assert loss.isfinite() and error.isfinite()
    same, _ = _loss(teacher, teacher, blocks, Goal(answers=0.0), x)
    assert same.item() == 0.0


def test_channels_of_experts_are_traced_by_samples_that_reach_them() -> None:
    """What all experts give is added to what they read: it leaves together, at all of them."""
    torch.manual_seed(0)
    model, x = Routed(skip=True), torch.randn(64, 8)
    alone = {group.name for group in cuttable(model, (x[:1],))[0]}
    assert len([name for name in alone if name.startswith("experts")]) == 1
    assert "first" not in alone
    groups = {group.name: group for group in cuttable(model, (x[:1],), [(x,)])[0]}
    assert {f"experts.{i}.0" for i in range(4)} <= groups.keys()
    ends = {layer for layer, side in groups["first"].slots if side == "out"}
    assert ends == {"first", *(f"experts.{i}.2" for i in range(4))}


def test_batch_norms_that_read_nothing_keep_their_statistics() -> None:
    torch.manual_seed(0)
    model = Routed(skip=False)
    for expert in model.experts:
        expert[1] = nn.BatchNorm1d(16)
        expert[1].running_mean.fill_(5.0)
    recalibrate(model, [(torch.randn(64, 8),), (torch.randn(64, 8),)])
    means = [float(expert[1].running_mean.mean()) for expert in model.experts]
    assert means[3] == 5.0
    assert all(abs(mean) < 2 for mean in means[:3])
    assert not any(
        expert[1]._forward_pre_hooks or expert[1].training != model.training
        for expert in model.experts
    )


def test_experts_that_other_samples_reach_are_rounded_and_ends_stay_ends() -> None:
    """One sample calls one expert; the last layer keeps 8 bits, whatever is found after it."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 8), torch.randint(0, 3, (64,))
    method = "groupwise_ptq(independent=1, joint=1)"
    rows = pliant.compress(Routed(skip=True), (x, y), method).report.layers
    forms = {row.layer: row.form for row in rows}
    reached = [f"experts.{number}.{part}" for number in range(3) for part in (0, 2)]
    assert {forms[name] for name in reached} == {"w4a4"}
    assert forms["first"] == forms["head"] == "w8a8"
    assert forms["experts.3.0"] == "dense"
