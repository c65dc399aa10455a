"""Fitting rounded networks: what each stage minimises, and that none ends worse."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pliant
from pliant.data import Data
from pliant.edits import Quantize, replay
from pliant.errors import MethodError
from pliant.families.quantize import tuning
from pliant.families.quantize.levels import begun
from pliant.families.quantize.samples import Shown, few
from pliant.families.quantize.tunable import Tunable, tunable, tunables
from pliant.families.quantize.tuning import Goal, Judge, Rates, correct, independent, joint
from pliant.methods.quantize.groupwise_ptq import GroupwisePTQ
from pliant.observe.outputs import answers
from pliant.observe.ranges import observe
from pliant.observe.watch import beside
from pliant.run import start
from pliant.surgery.fold import foldable
from tests.test_quantize import convnet, images, noise

BLOCKS = ["conv1", "layer1.0", "linear"]


def pair(bits: int = 3, inputs: int = 8, seed: int = 0) -> tuple[nn.Module, nn.Module, Any]:
    """A folded network, a rounded copy that can be fitted, and inputs."""
    teacher, x = convnet(seed), (noise(32, 3, 8, 8),)
    replay(teacher, foldable(teacher, x))
    teacher.eval().requires_grad_(False)
    student = copy.deepcopy(teacher)
    names = [n for n, m in teacher.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    plan = {name: Quantize(name, bits, 4, True, inputs) for name in names}
    flows = observe(teacher, plan, [x])
    tunable(
        student,
        {n: (e.written, begun(teacher, e, "range", flows[n])) for n, e in plan.items()},
    )
    return teacher, student, x


def error(model: nn.Module, other: nn.Module, x: Any) -> float:
    pairs = zip(answers(model(*x)), answers(other(*x)), strict=True)
    return sum(float((a - b).square().mean() / b.var()) for a, b in pairs)


# ---------------------------------------------------------------- bias correction


@pytest.mark.parametrize("kind", ["convolution", "transposed", "linear"])
def test_corrected_biases_leave_no_mean_error(kind: str) -> None:
    """Afterwards each channel of each layer has its mean output, on what it reads in the dense."""
    torch.manual_seed(0)
    layer, x = {
        "convolution": (nn.Conv2d(4, 6, 3), noise(64, 4, 5, 5)),
        "transposed": (nn.ConvTranspose1d(4, 6, 3), noise(64, 4, 5)),
        "linear": (nn.Linear(4, 6), noise(64, 3, 4)),
    }[kind]
    teacher = nn.Sequential(layer)
    student = copy.deepcopy(teacher)
    edit = Quantize("0", 2, 1, False, 3)
    flow = observe(teacher, ["0"], [(x,)])["0"]
    tunable(student, {"0": (edit.written, begun(teacher, edit, "range", flow))})

    def gaps() -> Tensor:
        axes = (0, 1) if kind == "linear" else (0, *range(2, x.dim()))
        return (student(x) - teacher(x)).detach().mean(axes)

    assert gaps().abs().max() > 1e-3
    correct(teacher, student, [(x[:32],), (x[32:],)])
    assert gaps().abs().max() < 1e-5


def test_biases_are_corrected_if_asked() -> None:
    data, options = images(), {"bits": 2, "activations": 3, "independent": 0, "joint": 0}
    found = {}
    for on in (True, False):
        model = convnet()
        start(model, GroupwisePTQ(**options, samples=32, correct=on), data=data).finish()  # type: ignore[arg-type]
        teacher = convnet()
        replay(teacher, foldable(teacher, data.example()))
        x = read_by(teacher.eval(), "layer1.0.conv1", few_of(data))
        gap = model.layer1[0].conv1(x) - teacher.layer1[0].conv1(x)  # type: ignore[index, union-attr]
        found[on] = float(gap.mean((0, 2, 3)).abs().max())
    assert found[True] < 0.05 * found[False]


def read_by(model: nn.Module, layer: str, inputs: Any) -> Any:
    seen: list[Any] = []
    with beside(model, [layer], lambda name, args, kwargs, output: seen.append(args[0])):
        model(*inputs)
    return seen[0]


def few_of(data: Data) -> Any:
    run = start(convnet(), GroupwisePTQ(samples=32, batch=32), data=data)
    return few(run, 32, 32).look[0]


# ---------------------------------------------------------------- what stage 2 minimises


def test_the_loss_of_stage_two_is_features_and_answers() -> None:
    """L = mu sum_j |x^_j - x_j|^2 / (n var x_j) + nu T^2 KL(softmax(z/T) || softmax(z^/T))."""
    teacher, student, x = pair()
    said: dict[str, list[Tensor]] = {name: [] for name in BLOCKS}
    for model in (teacher, student):
        with beside(model, BLOCKS, lambda n, a, k, y: said[n].append(y.detach())):
            model(*x)
    features = sum(
        float((mine - other).square().mean() / other.var(correction=0))
        for other, mine in said.values()
    )
    target, scores = said["linear"]
    apart = F.kl_div(
        (scores / 4).log_softmax(1), (target / 4).log_softmax(1), log_target=True, reduction="none"
    )
    divergence = 16 * float(apart.sum(1).mean())
    squared = float((scores - target).square().mean() / target.var(correction=0))
    assert min(features, divergence, squared) > 1e-5
    for goal, wanted in (
        (Goal(features=2.0, answers=0.0), 2 * features),
        (Goal(features=0.0, answers=3.0), 3 * divergence),
        (Goal(features=0.0, answers=3.0, outputs="values"), 3 * squared),
        (Goal(), features + divergence),
    ):
        found, relative = tuning._loss(teacher, student, BLOCKS, goal, Shown(x))
        assert float(found) == pytest.approx(wanted, rel=1e-4)
        assert float(relative) == pytest.approx(squared, rel=1e-4)


def test_stage_two_lowers_features_that_answers_do_not_see() -> None:
    """With answers left out, the features alone pull the network to the dense one."""
    teacher, student, x = pair(bits=2)
    goal = Goal(features=1.0, answers=0.0)
    judge = Judge(teacher, student, BLOCKS, goal, [Shown(x)])
    judge.see()
    before = float(tuning._loss(teacher, student, BLOCKS, goal, Shown(x))[0])
    batches = iter(lambda: Shown(x), None)
    rates = Rates(0.05, 0.005)
    joint(teacher, student, BLOCKS, batches, steps=20, rates=rates, goal=goal, judge=judge)
    judge.best.restore()
    assert float(tuning._loss(teacher, student, BLOCKS, goal, Shown(x))[0]) < 0.8 * before


def test_stage_two_begins_where_no_small_step_turns_the_rounding_over() -> None:
    """Weights a hair from the next level, as stage 1 leaves them: tiny steps ruin nothing."""
    teacher, student, x = pair(bits=4)
    for _, layer in tunables(student):
        level = layer.scales["weight"].exp()[layer.index].view(-1, *[1] * (layer.weight.dim() - 1))
        edge = noise(*layer.weight.shape).sign() * 0.499 * level
        layer.layer.weight.data = (layer.weight + edge).detach()
    goal = Goal()
    judge = Judge(teacher, student, BLOCKS, goal, [Shown(x)])
    judge.see()
    rates = Rates(0.01, 0.001)
    joint(teacher, student, BLOCKS, iter([Shown(x)]), steps=1, rates=rates, goal=goal, judge=judge)
    assert judge.losses[-1] < 1.2 * judge.losses[0]


def test_a_weight_nearer_to_its_level_gives_the_same_answers() -> None:
    _, student, x = pair(bits=3)
    before = answers(student(*x))[0].detach()
    for _, layer in tunables(student):
        far = (layer.layer.weight - layer.weight).detach()
        layer.centre()
        assert torch.allclose(layer.layer.weight - layer.weight, far / 2, atol=1e-6)
    assert torch.equal(answers(student(*x))[0].detach(), before)


class Boxes(nn.Module):
    """Class scores and boxes, as detectors give them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.classes, self.boxes = nn.Linear(32, 4), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x)
        return {"logits": self.classes(hidden), "boxes": self.boxes(hidden).sigmoid()}


def test_answers_that_are_no_classes_are_compared_by_squared_error() -> None:
    torch.manual_seed(0)
    teacher = Boxes().eval().requires_grad_(False)
    other = copy.deepcopy(teacher)
    other.boxes.bias.data += 1.0
    x = noise(16, 8)
    goal = Goal(features=0.0)
    found, relative = tuning._loss(teacher, other, ["body"], goal, Shown((x,)))
    one, two = other(x)["boxes"], teacher(x)["boxes"]
    wanted = float((one - two).square().mean() / two.var(correction=0))
    assert float(found) == pytest.approx(wanted) and float(relative) == pytest.approx(wanted)


# ---------------------------------------------------------------- never worse than before


def test_steps_that_ruin_a_block_are_taken_back() -> None:
    """Huge steps in stage 1: every block ends as it began, to the bit."""
    teacher, student, x = pair()
    before = copy.deepcopy(student.state_dict())
    errors = independent(
        teacher,
        student,
        BLOCKS,
        iter(lambda: Shown(x), None),
        steps=4,
        rates=Rates(50.0, 1.0),
        held=[Shown(x)],
    )
    assert all(first == last for first, last in errors.values())
    after = student.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_every_block_ends_in_its_best_state_on_inputs_held_out() -> None:
    teacher, student, x = pair()
    held = [Shown((noise(32, 3, 8, 8, seed=5),))]
    errors = independent(
        teacher,
        student,
        BLOCKS,
        iter(lambda: Shown(x), None),
        steps=40,
        rates=Rates(0.02, 0.003),
        held=held,
    )
    assert all(last <= first for first, last in errors.values())
    assert errors["layer1.0"][1] < 0.8 * errors["layer1.0"][0]
    now = tuning.block_errors(teacher, student, BLOCKS, held)
    assert now == pytest.approx({name: last for name, (_, last) in errors.items()})


@pytest.mark.parametrize("stage", ["independent", "joint"])
@pytest.mark.parametrize("kind", ["classes", "boxes"])
def test_tuning_never_ends_worse_than_it_began(stage: str, kind: str) -> None:
    """With steps that ruin the network, what comes out is what was only rounded."""
    torch.manual_seed(0)
    model = (Boxes() if kind == "boxes" else convnet()).eval()
    x = noise(64, 8) if kind == "boxes" else noise(64, 3, 8, 8)
    data, found = (x, torch.arange(64) % 4), {}
    for steps in (0, 5):
        options = {"independent": 0, "joint": 0, stage: steps}
        method = GroupwisePTQ(**options, bits=8, activations=8, lr=1.0, scale_lr=1.0, slowdown=1.0)  # type: ignore[arg-type]
        found[steps] = pliant.compress(model, data, method).model.eval()
    assert error(found[5], model, (x,)) <= error(found[0], model, (x,))


def test_a_state_of_lower_loss_and_worse_answers_is_not_kept() -> None:
    """Scores come nearer while boxes go astray: the loss falls, the answers are worse."""
    torch.manual_seed(0)
    teacher = Boxes().eval().requires_grad_(False)
    student, x = copy.deepcopy(teacher), (noise(16, 8),)
    plan = {name: Quantize(name, 8, 1, False) for name in ("classes", "boxes")}
    tunable(student, {n: (e.written, begun(teacher, e, "range")) for n, e in plan.items()})
    layers = dict(tunables(student))
    layers["classes"].layer.bias.data += torch.tensor([1.0, 0, 0, 0])
    judge = Judge(teacher, student, ["classes"], Goal(answers=0.0), [Shown(x)])
    judge.see()
    layers["classes"].layer.bias.data -= torch.tensor([0.5, 0, 0, 0])
    layers["boxes"].layer.bias.data += 3.0
    judge.see()
    assert judge.losses[1] < judge.losses[0]
    judge.best.restore()
    assert float((layers["boxes"].layer.bias - teacher.boxes.bias).abs().max()) < 1e-6  # type: ignore[operator]


def test_inputs_held_out_are_not_learned_from() -> None:
    inputs = torch.arange(64.0).view(64, 1)
    data = Data((inputs, torch.zeros(64).long()))
    run = start(
        nn.Sequential(nn.Linear(1, 32)),
        GroupwisePTQ(activations=0),
        data=data,
        example=(torch.zeros(1, 1),),
    )
    found = few(run, 32, 8)
    rows = found.look, [shown.inputs for shown in found.held]
    look, held = ({v for b in row for v in b[0].flatten().tolist()} for row in rows)
    stream = found.stream()
    learned = {v for _ in range(9) for v in next(stream).inputs[0].flatten().tolist()}
    assert (len(look), len(held), len(learned)) == (32, 8, 24)
    assert held | learned == look and not held & learned
    loader = [(inputs[i : i + 8], torch.zeros(8).long()) for i in range(0, 64, 8)]
    run.data = Data(loader)
    found = few(run, 32, 8)
    assert (len(found.look), len(found.held)) == (4, 1)
    stream = found.stream()
    assert not any(torch.equal(next(stream).inputs[0], found.held[0].inputs[0]) for _ in range(6))


# ---------------------------------------------------------------- a loss of the user's


def test_a_loss_of_the_users_takes_the_place_of_the_answers() -> None:
    """Of two outputs only the second counts for the loss, so stage 2 fits that one better."""
    torch.manual_seed(0)
    x, y = torch.randn(128, 16), torch.randn(128, 4)
    dense = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))

    def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (output[:, 4:] - batch[1]).square().mean()

    spec = "groupwise_ptq(bits=2, ends=2, independent=0, joint=40, features=0.0, lr=0.05)"
    with_loss = pliant.compress(dense, Data(train=(x, y)), spec, loss=loss)
    without = pliant.compress(dense, Data(train=(x, y)), spec)
    (row,) = [row for row in with_loss.report.history if row.get("stage") == "joint"]
    assert row["by"] == "the task's loss" and min(row["losses"]) < row["losses"][0]
    with torch.no_grad():
        scores = [float(loss(each.model(x), (x, y))) for each in (with_loss, without)]
    assert scores[0] < scores[1]


def test_a_loss_that_cannot_be_computed_is_refused_in_words() -> None:
    x, dense = torch.randn(32, 16), nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with pytest.raises(MethodError, match="criterion"):
        pliant.compress(dense, Data(train=(x, x)), "groupwise_ptq", loss=nn.CrossEntropyLoss())


# ---------------------------------------------------------------- rates


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_step_of_a_weight_is_counted_in_levels(bits: int) -> None:
    """Adam's first step is the rate: so many levels for every width, scales by a share."""
    teacher, student, x = pair(bits=bits)
    first = copy.deepcopy(student)
    for _, layer in tunables(first):
        layer.centre()
    before = {n: (m.layer.weight.detach(), m.level()) for n, m in tunables(first)}
    scales = {n: m.scales["weight"].detach().clone() for n, m in tunables(student)}
    scales |= {f"{n} input": m.scales["input"].detach().clone() for n, m in tunables(student)}
    rates = Rates(0.25, 0.01)
    judge = Judge(teacher, student, BLOCKS, Goal(), [Shown(x)])
    judge.see()
    joint(
        teacher,
        student,
        BLOCKS,
        iter(lambda: Shown(x), None),
        steps=1,
        rates=rates,
        goal=Goal(),
        judge=judge,
    )
    for name, layer in tunables(student):
        weight, level = before[name]
        moved = float((layer.layer.weight - weight).abs().max())
        assert moved == pytest.approx(0.25 * level, rel=1e-2)
        share = float((layer.scales["weight"] - scales[name]).abs().max())
        assert share == pytest.approx(0.01 * (7 / (2 ** (bits - 1) - 1)) ** 0.5, rel=1e-2)
        inputs = float((layer.scales["input"] - scales[f"{name} input"]).abs())
        assert inputs == pytest.approx(0.01, rel=1e-2)


# ---------------------------------------------------------------- every option counts


CHANGES: list[tuple[str, Any]] = [
    ("bits", 2),
    ("activations", 3),
    ("ends", 4),
    ("rows", 4),
    ("groups", 1),
    ("step", 0.5),
    ("grouping", "contiguous"),
    ("grouping", "equal"),
    ("samples", 20),
    ("independent", 5),
    ("joint", 5),
    ("batch", 12),
    ("lr", 0.01),
    ("scale_lr", 0.001),
    ("slowdown", 0.5),
    ("features", 3.0),
    ("answers", 0.2),
    ("temperature", 1.0),
    ("outputs", "values"),
    ("correct", False),
    ("integer", True),
    ("only", ("layer1.*", "table")),
    ("exclude", ("linear",)),
]


class Words(nn.Module):
    """A small residual network that reads rows of a table as pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv1 = nn.Embedding(64, 64), nn.Conv1d(4, 16, 3, padding=1)
        self.layer1 = nn.ModuleList([nn.Conv1d(16, 16, 3, padding=1) for _ in range(2)])
        self.linear = nn.Linear(16, 4)

    def forward(self, words: Tensor) -> Tensor:
        x = self.conv1(self.table(words)).relu()
        for layer in self.layer1:
            x = x + layer(x).relu()
        return self.linear(x.mean(2))


@pytest.fixture(scope="module")
def plain_result() -> dict[str, Any]:
    return fitted_words()


def fitted_words(**options: Any) -> dict[str, Any]:
    """Fit to the last step: nothing is taken back here, so that every option is seen."""
    torch.manual_seed(0)
    model = Words().eval()
    words = torch.randint(0, 64, (32, 4), generator=torch.Generator().manual_seed(1))
    data = Data((words, torch.arange(32) % 4), classes=4)
    base = {"bits": 3, "samples": 24, "batch": 8, "independent": 4, "joint": 4, "lr": 0.05}
    method = GroupwisePTQ(**base | options)  # type: ignore[arg-type]
    run = start(model, method, data=data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning.Best, "restore", lambda self: None)
        run.finish()
    return dict(run.model.state_dict()) | {"forms": [edit.form for edit in run.edits]}


@pytest.mark.parametrize(("option", "value"), CHANGES)
def test_an_option_changes_the_result(
    option: str, value: Any, plain_result: dict[str, Any]
) -> None:
    found = fitted_words(**{option: value})
    same = list(found) == list(plain_result) and all(
        torch.equal(found[name], other) if isinstance(other, Tensor) else found[name] == other
        for name, other in plain_result.items()
    )
    assert not same


def test_the_same_options_give_the_same_result(plain_result: dict[str, Any]) -> None:
    found = fitted_words()
    tensors = [name for name, value in found.items() if isinstance(value, Tensor)]
    assert all(torch.equal(found[name], plain_result[name]) for name in tensors)
    options = {name for name, _ in CHANGES}
    assert options == {option.name for option in fields(GroupwisePTQ)}


def test_the_layers_that_are_fitted_are_those_that_read_numbers() -> None:
    teacher = Words()
    assert isinstance(teacher.table, nn.Embedding)
    found = fitted_words(rows=0)
    assert "table.weight" in found and not any(isinstance(v, Tunable) for v in found.values())
