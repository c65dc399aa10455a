"""Every task is told where there is no doubt, refused in a sentence where there is, and judged."""

import copy
import importlib
import math
import re
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pliant
from pliant.api.verdict import judge, said
from pliant.data import Data, Metric, Task
from pliant.data.guess import guess, task_loss
from pliant.data.ready import READY, task_of
from pliant.drivers.score import Score, distillation, evaluate, fidelity
from pliant.drivers.settle import settle
from pliant.errors import AccuracyWarning, DataError, MethodError, ModelError
from pliant.run import start

N = 48
PLAN = pliant.Train(epochs=1, batch=16, lr=1e-3, optimizer="adamw", device="cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def whole(high: int, *shape: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=seeded(1))


def flat(outputs: int, *last: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, outputs), *last
    )


def maps(outputs: int, *last: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, outputs, 3, padding=1), *last
    )


ROWS, IMAGES, STEPS = noise(N, 8), noise(N, 3, 12, 12), noise(N, 5, 8)


def told(model: nn.Module, inputs: Any, labels: Any, task: Task | str | None = None) -> Task:
    data = Data(train=(inputs, labels), val=(inputs, labels))
    named = task_of(task) if task is not None else None
    found = settle(named, model, data, ["val"], trains=False)
    assert found is not None
    return found


# ---------------------------------------------------------------- told


@pytest.mark.parametrize(
    ("model", "inputs", "labels", "name"),
    [
        (flat(5), ROWS, whole(5, N), "classification(axis=1)"),
        (flat(5), ROWS, whole(5, N).to(torch.int8), "classification(axis=1)"),
        (flat(5), ROWS, whole(5, N).to(torch.uint16), "classification(axis=1)"),
        (flat(5), ROWS, whole(5, N, 1).byte(), "classification(axis=1)"),
        (flat(5), STEPS, whole(4, N, 5), None),  # 5 classes at 5 steps
        (flat(7), STEPS, whole(7, N, 5), "classification(axis=-1)"),
        (flat(1), ROWS, whole(2, N), "binary"),
        (flat(1), ROWS, whole(2, N, 1).byte(), "binary"),
        (flat(1), ROWS, whole(2, N).bool(), "binary"),
        (flat(1), ROWS, whole(2, N).float(), "binary"),
        (flat(1, nn.Sigmoid()), ROWS, whole(2, N), "binary(probabilities=True)"),
        (flat(1, nn.Sigmoid(), nn.Flatten(0)), ROWS, whole(2, N), "binary(probabilities=True)"),
        (flat(6), ROWS, whole(2, N, 6), "multi-label"),
        (flat(6), ROWS, whole(2, N, 6).double(), "multi-label"),
        (flat(1), ROWS, noise(N), "regression"),
        (flat(1, nn.Flatten(0)), ROWS, noise(N, 1), "regression"),
        (flat(3), ROWS, noise(N, 3), "regression"),
        (flat(3), STEPS, noise(N, 5, 3), "regression"),
        (maps(3), IMAGES, noise(N, 3, 12, 12), "regression"),
        (maps(1), IMAGES, noise(N, 12, 12), "regression"),
        (maps(4), IMAGES, whole(4, N, 12, 12), "segmentation"),
        (maps(4), IMAGES, whole(4, N, 1, 12, 12).byte(), "segmentation"),
        (maps(4), IMAGES, whole(4, N, 12, 12, low=-1), "segmentation"),
        (maps(1), IMAGES, whole(2, N, 12, 12), "binary"),
        # in doubt
        (flat(3), ROWS, noise(N), None),
        (flat(5), ROWS, whole(5, N).float(), None),
        (flat(1), ROWS, whole(8, N), None),
        (flat(3), ROWS, whole(9, N, 3), None),
        (flat(5), ROWS, torch.eye(5)[whole(5, N)], None),
        (flat(5), ROWS, torch.eye(5)[whole(5, N)].long(), None),
        (flat(5), ROWS, noise(N, 5).softmax(1), None),
        (flat(1), ROWS[:8], torch.tensor([0.0, 1.0] * 4), None),
        (flat(5), ROWS, whole(6, N), None),
        (flat(5), ROWS, whole(5, N, low=-1), None),
        (maps(4, nn.AvgPool2d(2)), IMAGES, whole(4, N, 12, 12), None),
        (maps(4), IMAGES, whole(6, N, 12, 12), None),
        (maps(12), IMAGES, whole(9, N, 12, 12), None),  # classes first or last
        (maps(1), IMAGES, 255 * whole(2, N, 12, 12), None),
        (maps(3), IMAGES, whole(256, N, 3, 12, 12).byte(), None),
    ],
)
def test_a_task_is_told_or_refused(
    model: nn.Module, inputs: Tensor, labels: Tensor, name: str | None
) -> None:
    if name is not None:
        assert str(told(model, inputs, labels)) == name
        return
    with pytest.raises(DataError, match=r"task='|pass loss=") as error:
        told(model, inputs, labels)
    assert "long()" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "inputs", "labels", "name"),
    [
        (flat(5), STEPS, whole(5, N, 5), "classification(axis=-1)"),
        (flat(5), ROWS, torch.eye(5)[whole(5, N)], "classification"),
        (flat(5), ROWS, whole(5, N).float(), "classification"),
        (flat(5), ROWS, whole(5, N, low=-1), "classification(void=-1)"),
        (flat(5), ROWS, torch.eye(5)[whole(5, N)].long(), "multi-label"),
        (flat(1), ROWS, whole(8, N), "regression"),
        (flat(3), ROWS, whole(9, N, 3), "regression"),
        (maps(4, nn.AvgPool2d(2)), IMAGES, whole(4, N, 12, 12), "segmentation"),
        (maps(4), IMAGES, whole(6, N, 12, 12).clamp(max=4), "segmentation(void=4)"),
        (maps(3), IMAGES, noise(N, 3, 12, 12).sigmoid(), "super-resolution"),
    ],
)
def test_a_name_ends_a_doubt(model: nn.Module, inputs: Tensor, labels: Tensor, name: str) -> None:
    for train in (None, PLAN):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AccuracyWarning)
            found = pliant.compress(
                model, (inputs, labels), "energy(p=0.9)", train=train, task=name
            )
        assert found.report.task.startswith(name.rstrip(")"))
        value = found.report.after.metrics[found.report.verdict.metric]  # type: ignore[union-attr]
        assert value is not None and math.isfinite(value)


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("classification", noise(N), "whole numbers"),
        ("binary", whole(3, N), "0 or 1"),
        ("regression", noise(N, 2), "shape of the outputs"),
        ("segmentation", whole(2, N), "a map of classes"),
        ("next-token", whole(2, N), r"\(N, T, V\)"),
        ("super-resolution", noise(N, 5), r"images \(N, C, H, W\)"),
        ("own", whole(5, N), "does not"),
        ("segmantation", whole(5, N), "did you mean 'segmentation'"),
        ("segmentation(viod=3)", whole(5, N), "no option 'viod'"),
        ("segmentation(void=", whole(5, N), "Cannot read the task"),
    ],
)
def test_a_name_that_does_not_fit_is_refused_before_any_work(
    name: str, labels: Tensor, message: str
) -> None:
    seen: list[Any] = []

    class Works(pliant.Method):
        def prepare(self, run: Any) -> None:
            seen.append(run)

    model = flat(1 if name in ("binary", "regression") else 5)
    for train in (None, PLAN):
        with pytest.raises(pliant.PliantError, match=message):
            pliant.compress(model, (ROWS, labels), Works(), train=train, task=name)
    assert not seen


def test_float_labels_are_a_regression_from_end_to_end() -> None:
    target = ROWS @ noise(8, 2, seed=3)
    for data in ((ROWS, target), DataLoader(TensorDataset(ROWS, target), 16)):
        result = pliant.compress(flat(2), data, "energy(p=0.9)", train=PLAN)
        assert result.report.task == "regression"
    report = pliant.compress(flat(2), (ROWS, target), "energy(p=0.99)").report
    assert list(report.after.metrics) == ["R2", "RMSE"] and report.after.accuracy is None


def test_all_labels_in_memory_are_looked_at() -> None:
    """More than are looked at one batch long."""
    rows, labels = ROWS.repeat(3, 1), whole(5, 3 * N)
    labels[-1] = 5
    with pytest.raises(DataError, match="5 came"):
        told(flat(5), rows, labels)
    labels = whole(2, 3 * N)
    labels[-1] = 2
    with pytest.raises(DataError, match="in doubt"):
        told(flat(1), rows, labels)


def test_the_task_is_that_of_the_most_labels_wherever_it_is_scored() -> None:
    """Ten labels that are 0 or 1 leave a doubt, and the others of the training split end it."""
    labels = whole(2, N).float()
    data = Data(train=(ROWS, labels), val=(ROWS[:10], labels[:10]))
    for trains in (False, True):
        splits: Any = ["train", "val"] if trains else ["val"]
        task = settle(None, flat(1), data, splits, trains=trains)
        assert task is not None and task.name == "binary"


# ---------------------------------------------------------------- language models


class Causal(nn.Module):
    """Says of every token what follows, from what came before."""

    def __init__(self, *, looks_ahead: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.hidden = nn.Embedding(9, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 9)
        self.looks_ahead = looks_ahead

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.table(input_ids).cumsum(1)
        if self.looks_ahead:
            hidden = hidden + self.table(input_ids).flip(1).cumsum(1).flip(1)
        return self.head(self.hidden(hidden).relu())


def test_labels_that_are_the_inputs_of_a_causal_network_are_shifted() -> None:
    tokens = whole(9, N, 7)
    assert told(Causal(), tokens, tokens).name == "next-token"
    batches = [{"input_ids": part, "labels": part} for part in tokens.split(8)]
    found = settle(None, Causal(), Data(batches, batches), ["val"], trains=False)
    assert found is not None and found.name == "next-token"
    prompts = torch.where(torch.arange(7) < 3, -100, tokens)
    assert told(Causal(), tokens, prompts).name == "next-token"


def test_labels_that_are_shifted_already_are_not_shifted_again() -> None:
    tokens = whole(9, N, 8)
    task = told(Causal(), tokens[:, :-1], tokens[:, 1:])
    assert str(task) == "classification(axis=-1)"
    assert str(told(Causal(), tokens, whole(4, N, 8) + 1)) == "classification(axis=-1)"


def test_a_network_that_looks_ahead_may_copy() -> None:
    tokens = whole(9, N, 7)
    with pytest.raises(DataError, match="task='next-token'"):
        told(Causal(looks_ahead=True), tokens, tokens)


def test_a_causal_model_of_transformers_trains_and_is_scored_on_the_next_token() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=9, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    tokens = (whole(9, N, 1) + 2 * torch.arange(8)) % 9
    batches = [{"input_ids": part, "labels": part} for part in tokens.split(8)]
    data = Data(batches, batches)
    task = settle(None, model, data, ["train"], trains=True)
    assert task is not None and task.name == "next-token"
    own = settle(task_of("own"), model, data, ["train"], trains=True)
    assert own is not None and own.feeds == "labels" and not own.trains
    scores = [evaluate(model, data, "val", task=each).loss for each in (task, own)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)  # Transformers shifts in the same way
    with pytest.raises(DataError, match="task='next-token'"):
        told(model, tokens, whole(9, N, 8))
    plan = pliant.Train(epochs=40, batch=8, lr=1e-2, optimizer="adamw", device="cpu")
    trained = pliant.compress(model, data, pliant.Method(), train=plan)
    assert trained.report.after.accuracy is not None and trained.report.after.accuracy > 0.9
    with torch.no_grad():
        given = trained.model(input_ids=tokens).logits[:, :-1].argmax(-1)
    right = float((given == tokens[:, 1:]).float().mean())
    assert trained.report.after.accuracy == pytest.approx(right)


# ---------------------------------------------------------------- networks with their own loss


class Detector(nn.Module):
    """In torchvision's convention: losses when it trains, answers when it does not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()
        )
        self.drop, self.boxes = nn.Dropout(0.5), nn.Linear(16, 4)

    def forward(self, images: Tensor, targets: Any = None) -> Any:
        found = self.boxes(self.drop(self.body(images).mean((2, 3))))
        if not self.training:
            return [{"boxes": row[None], "scores": row.norm()[None]} for row in found]
        wanted = torch.stack([target["boxes"].mean(0) for target in targets])
        gap = (found - wanted).square()
        return {"near": gap[:, :2].mean(), "far": gap[:, 2:].mean()}


def boxes() -> Data:
    targets = [{"boxes": noise(2, 4, seed=i)} for i in range(8)]
    batches = [(IMAGES[i : i + 8], targets) for i in range(0, N, 8)]
    return Data(batches, batches)


@pytest.mark.parametrize("train", [None, PLAN])
def test_detectors_are_trained_and_scored_by_their_own_loss(train: Any) -> None:
    model = Detector()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccuracyWarning)
        result = pliant.compress(model, boxes(), "energy(p=0.9)", train=train)
    report = result.report
    assert report.task == "own" and report.verdict is not None
    assert report.verdict.metric == "loss" and report.verdict.lost is not None
    assert report.before.loss is not None and report.before.metrics["loss"] == report.before.loss


def test_the_loss_of_a_detector_is_that_without_dropout_and_moves_no_statistics() -> None:
    model = Detector().train()
    task = settle(None, model, boxes(), ["val"], trains=False)
    assert task is not None and task.feeds == "targets" and task.trains
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, again = (evaluate(model, boxes(), "val", task=task).loss for _ in range(2))
    assert first == again and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    batch = next(iter(boxes().batches("val", 8)))
    model.eval()
    found = model.boxes(model.body(batch[0]).mean((2, 3)))
    wanted = torch.stack([target["boxes"].mean(0) for target in batch[1]])
    gap = (found - wanted).square()
    mean = gap[:, :2].mean() + gap[:, 2:].mean()
    assert float(mean.detach()) == pytest.approx(evaluate(model, Data(val=[batch]), task=task).loss)


def test_labels_for_a_network_that_has_no_loss_are_refused() -> None:
    class Blind(Detector):
        def forward(self, images: Tensor, targets: Any = None) -> Tensor:
            return self.boxes(self.body(images).mean((2, 3)))

    with pytest.raises(ModelError, match="returns its own loss"):
        pliant.compress(Blind(), boxes(), "energy(p=0.9)")
    report = pliant.compress(Blind(), boxes(), "energy(p=0.9)", task="none").report
    assert report.verdict is not None and report.verdict.lost is None
    assert report.fidelity is not None and report.before.loss is None
    with pytest.raises(DataError, match="no loss to train with"):
        pliant.compress(Blind(), boxes(), "energy(p=0.9)", task="none", train=PLAN)


# ---------------------------------------------------------------- losses and metrics of one's own


class Two(nn.Module):
    """Two heads of very different size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.one, self.other = nn.Linear(16, 4), nn.Linear(16, 2)

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        hidden = self.body(rows)
        return {"one": self.one(hidden), "other": 100 * self.other(hidden)}


def both(output: dict[str, Tensor], batch: Any) -> Tensor:
    return F.cross_entropy(output["one"], batch[1]) + 1e-4 * output["other"].square().mean()


def right(output: dict[str, Tensor], batch: Any) -> Tensor:
    return (output["one"].argmax(1) == batch[1]).float()


@pytest.mark.parametrize("train", [None, PLAN])
def test_a_loss_and_metrics_serve_any_network(train: Any) -> None:
    data, labels = (ROWS, whole(4, N)), whole(4, N)
    with pytest.raises(ModelError, match="2: pass loss= and metrics="):
        pliant.compress(Two(), data, "energy(p=0.9)", train=train)
    far = lambda output, batch: output["other"].abs().mean(1)  # noqa: E731
    metrics = {"right": (right, "higher", "share"), "far": (far, "lower")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccuracyWarning)
        asked: Any = {"train": train, "loss": both, "metrics": metrics}
        report = pliant.compress(Two(), Data(data, data), "energy(p=0.9)", **asked).report
    assert report.task == "custom" and list(report.after.metrics) == ["right", "far"]
    assert report.verdict is not None and report.verdict.metric == "right"
    assert report.verdict.unit == "points" and report.verdict.samples == N
    dense = Two().eval()
    with torch.no_grad():
        wanted = float(both(dense(ROWS), (ROWS, labels)))
    assert report.before.loss == pytest.approx(wanted, rel=1e-5)
    again = pliant.Report.from_json(report.to_json())
    assert again.verdict == report.verdict and again.fidelity == report.fidelity
    assert again.metrics["far"] == {"better": "lower", "unit": ""}


def test_a_loss_alone_judges_itself_and_metrics_alone_come_first() -> None:
    report = pliant.compress(Two(), (ROWS, whole(4, N)), "energy(p=0.99)", loss=both).report
    assert report.verdict is not None
    assert report.verdict.metric == "loss" and report.verdict.unit == "%"
    mine: Any = {"sure": (lambda o, b: o.softmax(1).amax(1), "higher")}
    report = pliant.compress(flat(5), (ROWS, whole(5, N)), "energy(p=0.99)", metrics=mine).report
    assert report.task == "classification(axis=1)"
    assert list(report.after.metrics) == ["sure", "accuracy"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"loss": lambda output, batch: output}, "take its mean"),
        ({"loss": lambda output, batch: 0.5}, "as a tensor, but float came"),
        ({"loss": lambda output, batch: output.nothing}, "raises"),
        ({"loss": 3}, "must be a function"),
        ({"metrics": {"mine": lambda output, batch: 0}}, "which way is better"),
        ({"metrics": {"mine": (lambda output, batch: output, "lower")}}, "a number for each"),
        ({"task": 3}, "A task must be one of"),
    ],
)
@pytest.mark.parametrize("train", [None, PLAN])
def test_what_cannot_be_scored_is_refused(asked: Any, message: str, train: Any) -> None:
    with pytest.raises(MethodError, match=message):
        pliant.compress(flat(5), (ROWS, whole(5, N)), "energy(p=0.9)", train=train, **asked)


def test_a_loss_without_a_gradient_is_refused_where_it_shall_train() -> None:
    def detached(output: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(output, batch[1]).detach()

    data = (ROWS, whole(5, N))
    with pytest.raises(MethodError, match="detach nothing"):
        pliant.compress(flat(5), data, "energy(p=0.9)", loss=detached, train=PLAN)
    pliant.compress(flat(5), data, "energy(p=0.9)", loss=detached)


def test_a_method_that_weighs_samples_needs_a_loss_of_each() -> None:
    class Weighs(pliant.Method):
        def weigh(self, run: Any, losses: Tensor, output: Any, batch: Any) -> Tensor:
            return torch.ones(len(losses))

    with pytest.raises(MethodError, match="reduction"):
        start(flat(5), Weighs(), example=(ROWS,), steps=2, loss=lambda output, batch: output.mean())
    start(flat(5), Weighs(), example=(ROWS,), steps=2, task="regression")


def test_weighing_is_exact_for_every_ready_task() -> None:
    """Losses one by one, weighted by one, are the mean."""
    from pliant.data.criterion import weighted

    masks = whole(4, N, 12, 12, low=-1)
    tokens = whole(9, N, 7)
    for output, labels, name in (
        (noise(N, 5), whole(5, N), "classification"),
        (noise(N, 4, 12, 12), masks, "segmentation"),
        (noise(N, 1), whole(2, N), "binary"),
        (noise(N, 6), whole(2, N, 6), "multi-label"),
        (noise(N, 3), noise(N, 3), "regression"),
        (noise(N, 7, 9), tokens, "next-token"),
    ):
        task = task_of(name)
        assert task is not None and task.weighs
        losses = task.total(output, (None, labels), "none")
        mean = task.total(output, (None, labels))
        assert torch.allclose(weighted(losses, None, output, labels), mean, atol=1e-6), name


# ---------------------------------------------------------------- judged


def scored(values: Tensor, metric: Metric) -> Score:
    return Score(math.nan, 0.0, values={"mine": metric.value(values)}, rows=values, metric=metric)


@pytest.mark.parametrize(
    ("better", "unit", "lost"),
    [("higher", "share", 10.0), ("higher", "dB", 20.0), ("lower", "", -20.0)],
)
def test_shares_lose_points_and_others_a_percentage(better: Any, unit: str, lost: float) -> None:
    before, after = torch.full((9,), 0.5).double(), torch.full((9,), 0.4).double()
    metric = Metric(lambda output, batch: output, better, unit)
    found = judge(scored(before, metric), scored(after, metric), 2.0)
    assert found.lost == pytest.approx(lost) and found.holds is (lost <= 2)
    assert found.unit == ("points" if unit == "share" else "%") and found.metric == "mine"
    assert (" points of its mine" if unit == "share" else " % of its mine") in said(found)


def test_the_interval_of_a_mean_is_that_of_paired_differences() -> None:
    before, gap = noise(200, seed=5).double(), 0.1 + 0.05 * noise(200, seed=6).double()
    metric = Metric(lambda output, batch: output, "higher", "share")
    found = judge(scored(before, metric), scored(before - gap, metric), 2.0)
    error = 100 * 1.96 * float(gap.std()) / math.sqrt(200)
    assert found.lost == pytest.approx(100 * float(gap.mean()))
    assert (found.low, found.high) == pytest.approx((found.lost - error, found.lost + error))  # type: ignore[operator]


def test_a_relative_loss_of_nothing_and_a_number_gone_are_said() -> None:
    metric = Metric(lambda output, batch: output, "lower")
    zero, one = torch.zeros(4).double(), torch.ones(4).double()
    assert "is 0" in judge(scored(zero, metric), scored(one, metric), 2.0).note
    gone = judge(scored(one, metric), scored(one * math.nan, metric), 2.0)
    assert gone.holds is False and gone.lost == math.inf


def test_a_drop_bounds_every_metric() -> None:
    target = ROWS @ noise(8, 2, seed=3)
    data = Data(train=(ROWS, target), val=(ROWS, target))
    plan = pliant.Train(epochs=60, batch=16, lr=1e-2, optimizer="adamw", device="cpu")
    trained = pliant.compress(flat(2), data, pliant.Method(), train=plan).model
    with pytest.warns(AccuracyWarning, match="points of its R2"):
        report = pliant.compress(trained, data, "energy(p=0.3, samples=0)").report
    assert report.verdict is not None and report.verdict.lost is not None
    gap = report.before.metrics["R2"] - report.after.metrics["R2"]  # type: ignore[operator]
    assert report.verdict.lost == pytest.approx(100 * gap)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AccuracyWarning)
        drop = pliant.Budget(params=0.9, drop=100)
        pliant.compress(trained, data, "energy(p=0.9)", drop)


def test_a_regression_that_explains_nothing_has_nothing_to_lose() -> None:
    report = pliant.compress(flat(2), (ROWS, noise(N, 2)), "energy(p=0.1)").report
    assert report.verdict is not None and report.verdict.holds is None
    assert "explains none" in report.verdict.note


# ---------------------------------------------------------------- fidelity


def test_networks_that_draw_in_eval_mode_are_compared_with_the_same_draws() -> None:
    """As masked autoencoders and samplers do: two copies agree, and the caller's state stays."""

    class Shuffles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.linear(inputs)[:, torch.rand(8).argsort()]

    net, inputs = Shuffles(), torch.randn(4, 8)
    before = torch.get_rng_state()
    found = fidelity(net, copy.deepcopy(net), [(inputs,)], "val")
    assert found is not None and found.error == 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", ["energy", "groupwise_ptq(independent=2, joint=2)"])
def test_a_single_number_beside_answers_does_not_outweigh_them(method: str) -> None:
    """A loss that a network returns has no spread to be measured by."""

    class Losing(nn.Module):
        def __init__(self, lost: bool) -> None:
            super().__init__()
            self.one, self.two, self.lost = nn.Linear(8, 16), nn.Linear(16, 4), lost

        def forward(self, inputs: Tensor) -> Any:
            hidden = self.one(inputs)
            found = self.two(hidden)
            return (found, hidden, hidden.square().mean()) if self.lost else (found, hidden)

    made = []
    for lost in (True, False):
        torch.manual_seed(0)
        rows = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
        made.append(pliant.compress(Losing(lost), [rows], method, None))
    one, other = (dict(result.model.state_dict()) for result in made)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_fidelity_by_hand() -> None:
    """The second network answers twice what the first does, and minus that in the last sample."""

    class Fixed(nn.Module):
        def __init__(self, *rows: float) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.tensor(rows)[:, None] * torch.tensor([[3.0, 4.0]]))

        def forward(self, x: Tensor) -> Tensor:
            return self.rows + 0 * x

    found = fidelity(Fixed(1, 1, 1, 1), Fixed(2, 2, 2, -2), [(torch.zeros(4, 1),)], "val")
    assert found is not None
    assert found.error == pytest.approx(math.sqrt((3 * 25 + 225) / 100))
    assert found.cosine == pytest.approx(0.5) and found.agreement == pytest.approx(0.75)
    assert found.samples == 4 and found.where == "val"


def test_fidelity_counts_every_output_alike() -> None:
    dense, small = Two().eval(), Two().eval()
    with torch.no_grad():
        small.one.weight.zero_()
        small.one.bias.zero_()
    found = fidelity(dense, small, [(ROWS,)], "val")
    assert found is not None and found.error == pytest.approx(math.sqrt(0.5))
    assert found.agreement is None and found.cosine == pytest.approx(0.5)


def test_fidelity_needs_no_labels_and_looks_at_inputs_held_out() -> None:
    batches = [(part,) for part in ROWS.split(16)]
    report = pliant.compress(flat(5), Data(batches, batches[:1]), "energy(p=0.999)").report
    assert report.fidelity is not None and report.verdict is not None
    assert report.fidelity.where == "val" and report.fidelity.samples == 16
    assert report.fidelity.error < 0.2 and report.fidelity.agreement is not None
    assert report.verdict.lost is None and report.before.loss is None
    report = pliant.compress(flat(5), batches, "energy(p=0.9)").report
    assert report.fidelity is not None and report.fidelity.where == "train"
    report = pliant.compress(flat(5), None, "energy(p=0.9)", example=(ROWS[:2],)).report
    assert report.fidelity is not None and report.fidelity.where == "example"


def test_fidelity_agrees_with_itself_by_the_task() -> None:
    for model, inputs, labels in (
        (flat(5), ROWS, whole(5, N)),
        (flat(1), ROWS, whole(2, N)),
        (maps(4), IMAGES, whole(4, N, 12, 12)),
    ):
        found = fidelity(model, model, [(inputs,)], "val", told(model, inputs, labels))
        assert found is not None and found.agreement == 1 and found.error == 0
    none = fidelity(flat(2), flat(2), [(ROWS,)], "val", task_of("regression"))
    assert none is not None and none.agreement is None


# ---------------------------------------------------------------- where tasks are used


def test_distillation_follows_the_task() -> None:
    output, target = noise(6, 4, seed=1), noise(6, 4, seed=2)
    gap = (output - target).square().mean() / target.var(correction=0)
    assert torch.allclose(distillation(output, target, 4.0, task_of("regression")), gap)
    maps_ = task_of("segmentation")
    wide, aim = noise(2, 3, 4, 4, seed=1), noise(2, 3, 4, 4, seed=2)
    mine, other = (each.movedim(1, -1).flatten(0, -2) for each in (wide, aim))
    plain = distillation(mine, other, 2.0)
    assert torch.allclose(distillation(wide, aim, 2.0, maps_), plain)
    one = distillation(output[:, :1], target[:, :1], 1.0, task_of("binary"))
    chance, wanted = output[:, 0].sigmoid(), target[:, 0].sigmoid()
    by_hand = wanted * (wanted / chance).log() + (1 - wanted) * ((1 - wanted) / (1 - chance)).log()
    assert torch.allclose(one, by_hand.mean(), atol=1e-6)


def test_a_loop_of_ones_own_takes_the_loss_of_the_run() -> None:
    batch = (ROWS, whole(2, N).float())
    model = flat(1)
    run = start(model, pliant.Method(), example=(ROWS,), steps=1, task="binary")
    wanted = F.binary_cross_entropy_with_logits(model(ROWS)[:, 0], batch[1])
    assert torch.allclose(run.task_loss(model(ROWS), batch), wanted)
    run = start(model, pliant.Method(), example=(ROWS,), steps=1)
    assert torch.allclose(run.task_loss(model(ROWS), batch), wanted) and run.task is not None
    run = start(model, pliant.Method(), example=(ROWS,), steps=1, loss=lambda o, b: b[1].sum())
    assert run.task_loss(model(ROWS), batch) == batch[1].sum()
    tokens = whole(9, N, 7)
    language = Causal()
    run = start(language, pliant.Method(), example=(tokens,), steps=1)
    scores = language(tokens)
    shifted = F.cross_entropy(scores[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert torch.allclose(run.task_loss(scores, (tokens, tokens)), shifted)


def test_the_log_of_a_training_holds_the_metrics_of_the_task() -> None:
    data = Data((IMAGES, whole(4, N, 12, 12)), (IMAGES, whole(4, N, 12, 12)))
    report = pliant.compress(maps(4), data, "energy(p=0.99)", train=PLAN).report
    rows = [row for row in report.history if "val_loss" in row]
    assert rows and all({"mIoU", "accuracy", "loss"} <= row.keys() for row in rows)


def test_a_loss_of_outputs_and_labels_alone() -> None:
    scores, labels = noise(6, 4), whole(4, 6)
    assert torch.equal(task_loss(scores, labels), F.cross_entropy(scores, labels))
    one = noise(6, 1)
    wanted = F.binary_cross_entropy_with_logits(one[:, 0], (labels % 2).float())
    assert torch.allclose(task_loss(one, labels % 2), wanted)
    with pytest.raises(DataError, match="has none"):
        guess(scores, (ROWS,))
    with pytest.raises(DataError, match="every sample"):
        guess(scores, (None, labels[:3]))


def test_every_ready_task_reads_its_own_name() -> None:
    for name, make in READY.items():
        task: Callable[..., Task] = make
        assert task().name == name and task_of(name) is not None


# ---------------------------------------------------------------- all outputs


class Heads(nn.Module):
    """A head of classes and a head of boxes whose numbers are a hundred times smaller, nested."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
        self.classes = nn.Sequential(nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Conv2d(24, 10, 1))
        self.boxes = nn.Sequential(nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Conv2d(24, 4, 1))

    def forward(self, images: Tensor) -> dict[str, Any]:
        hidden = self.body(images)
        found = self.classes(hidden).mean((2, 3))
        return {"logits": found, "more": {"boxes": [0.01 * self.boxes(hidden).mean((2, 3))]}}


def kept(report: pliant.Report) -> tuple[float, float]:
    """The share of the channels within each head that stayed."""
    rows = {row.layer: row.kept or (24, 24) for row in report.layers}
    return rows["classes.0"][0] / 24, rows["boxes.0"][0] / 24


def test_both_heads_count_whatever_their_scale() -> None:
    batches = [(part,) for part in IMAGES.split(16)]
    report = pliant.compress(Heads(), batches, "group_fisher(samples=48)", "macs=0.6").report
    classes, boxes_ = kept(report)
    assert 0.4 < classes < 0.9 and 0.4 < boxes_ < 0.9


@pytest.mark.parametrize("head", ["classes", "boxes"])
def test_a_loss_of_ones_own_says_which_head_counts(head: str) -> None:
    def loss(output: dict[str, Any], batch: Any) -> Tensor:
        found = output["logits"] if head == "classes" else 100 * output["more"]["boxes"][0]
        return (found - batch[1].unsqueeze(1)).square().mean()

    data = Data(train=(IMAGES, noise(N)))
    asked: Any = {"loss": loss}
    method = "group_fisher(samples=48)"
    classes, boxes_ = kept(pliant.compress(Heads(), data, method, "macs=0.6", **asked).report)
    assert (classes > 0.9 and boxes_ < 0.3) if head == "classes" else boxes_ > classes


def test_teachers_are_asked_along_the_classes() -> None:
    """Of maps (N, C, H, W) classes lie on axis 1, and every position is an answer."""
    from pliant.methods.distill.kd import KD
    from pliant.observe.aside import Teacher

    method: Any = KD(weight=1.0, temperature=1.0)
    run = start(maps(4), method, example=(IMAGES,), steps=1, task="segmentation")
    labels = whole(4, N, 12, 12)
    output = maps(4, nn.Tanh())(IMAGES)
    target = run.aside.get(Teacher).answer((IMAGES,), torch.device("cpu"))
    found = run.loss(torch.zeros(()), output, (IMAGES, labels))
    logs = [each.log_softmax(1) for each in (output, target)]
    by_hand = (logs[1].exp() * (logs[1] - logs[0])).sum(1).mean()
    assert torch.allclose(found, by_hand, atol=1e-5)
    with pytest.raises(DataError, match="leave it out of a regression"):
        start(flat(2), method, example=(ROWS,), steps=1, task="regression")


# ---------------------------------------------------------------- reports and trainers


@pytest.mark.parametrize(
    ("model", "labels", "name", "head"),
    [
        (maps(4), whole(4, N, 12, 12), "segmentation", r"mIoU [\d.]+ % → [\d.]+ %$"),
        (maps(3), noise(N, 3, 12, 12).sigmoid(), "super-resolution", r"PSNR [\d.]+ dB → [\d.]+ dB"),
        (maps(4), whole(4, N, 12, 12), "none", r"[\d.]+ % of answers as before$"),
    ],
)
def test_a_report_says_what_was_measured(
    model: nn.Module, labels: Tensor, name: str, head: str
) -> None:
    from pliant.render import words
    from pliant.render.html import html
    from pliant.render.markdown import markdown

    if name == "none":
        model = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    report = pliant.compress(model, (IMAGES, labels), "energy(p=0.9999)", task=name).report
    assert re.search(head, words.headline(report)), words.headline(report)
    assert f"| {report.task} |" in markdown(report) and name in html(report)
    assert "Beside the dense network, on 4 samples of val:" in markdown(report)
    if name == "segmentation":
        assert words.lost(report).startswith("mIoU kept: ") and " points " in words.lost(report)
    if name == "super-resolution":
        assert words.lost(report).startswith("PSNR kept: ") and " % " in words.lost(report)
        rows = {row.label: row for row in words.comparisons(report)}
        assert rows["PSNR"].before.endswith(" dB") and rows["SSIM"].after.endswith(" %")


def test_the_trainer_of_transformers_shifts_labels_without_being_told() -> None:
    transformers = pytest.importorskip("transformers")
    from pliant.drivers.hf import loss_function

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=9, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0,
        eos_token_id=0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    model, tokens = transformers.GPT2LMHeadModel(config).train(), whole(9, 6, 8)
    run = start(model, pliant.Method(), example={"input_ids": tokens}, steps=1)
    loss = loss_function(run)
    found = loss(model(input_ids=tokens), tokens)
    assert torch.allclose(found, model(input_ids=tokens, labels=tokens).loss, rtol=1e-5)
    assert run.task is not None and run.task.name == "next-token"


@pytest.mark.parametrize("trainer", ["lightning", "hf"])
def test_trainers_score_a_run_that_was_started_with_a_task(trainer: str) -> None:
    driver = importlib.import_module(f"pliant.drivers.{trainer}")
    data = Data((IMAGES, whole(4, N, 12, 12)), (IMAGES, whole(4, N, 12, 12)))

    def ended(**asked: Any) -> dict[str, Any]:
        run = start(maps(4), pliant.Method(), data=data, steps=1, **asked)
        callback = driver.PliantCallback(run)
        place = SimpleNamespace(world_size=1, trainer=None, callbacks=[])
        if trainer == "hf":
            callback.on_epoch_end(place, None, None)
        else:
            callback.on_train_epoch_end(place, None)
        return run.log[-1] if run.log else {}

    assert ended(task="segmentation").keys() >= {"mIoU", "accuracy", "val_loss"}
    assert "sure" in ended(metrics={"sure": (lambda o, b: o.softmax(1).amax((1, 2, 3)), "higher")})
    assert ended() == {}
    with pytest.raises(DataError, match="shape of the outputs"):
        ended(task="regression")
