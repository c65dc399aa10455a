"""A learning rate that destroys a trained network is said; one that does not is not."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant.data import Train
from pliant.errors import AccuracyWarning
from pliant.render import words
from pliant.render.markdown import markdown
from pliant.result import Report
from pliant.run import early

CLASSES = 4


def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points around four centres, well apart."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    return 3 * torch.eye(CLASSES, 8)[labels] + 0.3 * torch.randn(count, 8, generator=draw), labels


DATA = pliant.Data(samples(256, 1), test=samples(128, 2), classes=CLASSES)


def trained() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    inputs, labels = samples(256, 1)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
    return net


def compressed(net: nn.Module, method: str = "nrmf", **more: Any) -> pliant.Result:
    plan = Train(**{"epochs": 2, "batch": 16, "device": "cpu", "lr": 0.01} | more.pop("train", {}))
    budget = None if method in ("kd", "maxdropout") else "params=0.8"
    return pliant.compress(net, DATA, method, budget, train=plan, strict=False, **more)


def found(result: pliant.Result) -> list[str]:
    return [text for text in result.report.findings if "learning rate" in text]


@pytest.mark.parametrize("method", ["nrmf", "slimming", "kd", "maxdropout", "energy"])
def test_a_learning_rate_that_destroys_is_said_whatever_the_method(method: str) -> None:
    net = nn.Sequential(*trained())
    if method == "slimming":
        net = nn.Sequential(net[0], nn.BatchNorm1d(32, affine=True), *net[1:]).eval()
        with torch.no_grad():
            net[1].running_var.fill_(1 - net[1].eps)
    plan = {"lr": 30.0, "nesterov": False, "clip": 100.0}
    with pytest.warns(AccuracyWarning, match=r"learning rate \(30\) is too high .* take a tenth"):
        result = compressed(net, method, train=plan)
    assert len(found(result)) == 1
    report = Report.from_json(result.report.to_json())
    assert report.findings == result.report.findings
    assert found(result)[0] in words.verdict(report) and "take a tenth" in markdown(report)


def test_a_gentle_one_is_not() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", AccuracyWarning)
        assert not compressed(trained()).report.findings


def test_an_untrained_network_has_nothing_to_lose_by_it() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = compressed(net, train={"lr": 30.0, "nesterov": False, "clip": 100.0})
    assert not found(result)
    assert result.report.verdict is not None and "by chance" in result.report.verdict.note


def test_fine_tuning_is_watched_too() -> None:
    """With no search before it, as after one: its own first loss is what counts."""
    plan = {"epochs": 0, "finetune": 2, "lr": 30.0, "nesterov": False, "clip": 100.0}
    with pytest.warns(AccuracyWarning, match="steps of the finetune the loss rose"):
        compressed(trained(), "kd", train=plan)


@pytest.mark.parametrize(("rate", "times"), [(30.0, 1), (1e-4, 0)])
def test_lightning_is_watched_too(rate: float, times: int) -> None:
    """Its own optimizer's rate is named; `conclude` carries the finding into the report."""
    pl = pytest.importorskip("lightning.pytorch")
    from pliant.drivers.lightning import PliantCallback

    run = pliant.start(trained(), "energy", "params=0.9", data=DATA, steps=8)

    class Lit(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = run.model

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), rate)

    quiet = {name: False for name in ("logger", "enable_progress_bar", "enable_model_summary")}
    trainer = pl.Trainer(
        max_steps=8,
        accelerator="cpu",
        enable_checkpointing=False,
        callbacks=[PliantCallback(run)],
        **quiet,
    )
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*samples(256, 1)), 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Lit(), loader)
        result = pliant.conclude(run, DATA, dense=trained())
    assert len(found(result)) == times
    assert all(f"learning rate ({rate:g}) is too high" in text for text in found(result))


def by_hand(run: pliant.Run, rate: float, *, asked: bool = True, warm: int = 0) -> None:
    """A plain loop of eight steps more than its warm-up, which asks for its loss or does not."""
    optimizer = torch.optim.Adam(run.model.parameters(), rate)
    run.optimizer = optimizer
    for step, (inputs, labels) in enumerate(LOADER):
        if step == 8 + warm:
            break
        optimizer.param_groups[0]["lr"] = rate if step >= warm else rate * 1e-6 * (step + 1)
        optimizer.zero_grad()
        output = run.model(inputs)
        loss = nn.functional.cross_entropy(output, labels)
        loss = run.loss(loss, output, (inputs, labels)) if asked else loss
        loss.backward()
        run.before_step()
        optimizer.step()
        run.after_step()


ROWS = torch.utils.data.TensorDataset(*samples(2048, 1))
LOADER = torch.utils.data.DataLoader(ROWS, 32)


@pytest.mark.parametrize(
    ("rate", "asked", "warm", "times"),
    [(30.0, True, 0, 1), (1e-4, True, 0, 0), (30.0, False, 0, 0), (30.0, True, 40, 1)],
)
def test_a_plain_loop_is_watched_too(rate: float, asked: bool, warm: int, times: int) -> None:
    """By the loss that it shows to `Run.loss`, and for as long as its rate rises."""
    run = pliant.start(trained(), "energy", "params=0.9", data=DATA, steps=8 + warm)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        by_hand(run, rate, asked=asked, warm=warm)
    assert [Path(one.filename).name for one in said if one.category is AccuracyWarning] == [
        Path(__file__).name
    ] * times
    result = pliant.conclude(run, DATA, dense=trained(), strict=False)
    assert len(found(result)) == times
    assert all(f"learning rate ({rate:g}) is too high" in text for text in found(result))


def test_a_cut_is_not_taken_for_a_learning_rate() -> None:
    """What it costs shows at once, while the rate stays as gentle as it was."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", AccuracyWarning)
        run = pliant.start(trained(), "nrmf(search=0.5)", "params=0.3", data=DATA, steps=8)
        by_hand(run, 1e-5)
    assert run.edits and len(run.first.losses) == 4 and run.first.losses[0] > 0.5


@pytest.mark.parametrize(
    "method", ["asrfp(epochs=8, start=1.0, alpha=0.0)", "pgp(rounds=2, end=1.0, hard=0.0)"]
)
def test_weights_that_a_method_makes_zero_are_not_either(method: str) -> None:
    """The loss rises by them, so the watch begins anew as it does behind an edit."""
    run = pliant.start(trained(), method, data=DATA, steps=8)
    by_hand(run, 1e-5)
    assert len(run.first.losses) < 8


class Answers(nn.Module):
    """A network as Transformers calls it: it gives its loss where it gets labels."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Tensor, labels: Tensor | None = None, **more: Any) -> Any:
        scores = self.net(inputs)
        if labels is None:
            return {"logits": scores}
        total = nn.functional.cross_entropy(scores, labels, reduction="sum")
        return {"loss": total / more.get("num_items_in_batch", len(labels)), "logits": scores}


@pytest.mark.parametrize(
    ("rate", "own", "parts", "times"),
    [(30.0, True, 1, 1), (30.0, False, 8, 1), (1e-4, False, 1, 0)],
)
def test_transformers_are_watched_too(
    rate: float, own: bool, parts: int, times: int, tmp_path: Path
) -> None:
    """Whether the model gives its loss or the run computes it."""
    hf = pytest.importorskip("transformers")
    from pliant.drivers.hf import PliantCallback, loss_function

    run = pliant.start(trained(), "energy", "params=0.9", data=DATA, steps=8)
    trainer = hf.Trainer(
        Answers(run.model),
        hf.TrainingArguments(
            str(tmp_path),
            max_steps=8,
            learning_rate=rate,
            max_grad_norm=0.0,
            per_device_train_batch_size=32 // parts,
            gradient_accumulation_steps=parts,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
        ),
        train_dataset=[{"inputs": x, "labels": y} for x, y in zip(*samples(256, 1), strict=True)],
        callbacks=[PliantCallback(run)],
        compute_loss_func=loss_function(run) if own else None,
    )
    trainer.remove_callback(hf.PrinterCallback)
    inputs, labels = samples(256, 1)
    known = float(nn.functional.cross_entropy(run.model(inputs), labels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
        result = pliant.conclude(run, DATA, dense=trained())
    assert len(found(result)) == times
    assert all(f"learning rate ({rate:g}) is too high" in text for text in found(result))
    assert run.first.guessing == pytest.approx(math.log(CLASSES))
    assert 0.3 < run.first.losses[0] / known < 3  # of a batch, not of its part in a step


def test_what_was_seen_is_resumed(tmp_path: Path) -> None:
    """Killed after two steps, the finding comes all the same."""

    class Stop(Exception):
        pass

    steps: list[int] = []

    def watch(row: dict[str, Any]) -> None:
        steps.extend([1] if "step" in row else [])
        if len(steps) == 2:
            raise Stop

    plan = {"lr": 30.0, "nesterov": False, "clip": 100.0, "checkpoint_every": 1}
    with pytest.raises(Stop):
        compressed(trained(), train=plan, folder=tmp_path, watch=watch)
    with pytest.warns(AccuracyWarning):
        again = compressed(trained(), train=plan, folder=tmp_path, resume=True)
        whole = compressed(trained(), train=plan)
    assert again.report.findings == whole.report.findings and len(found(again)) == 1


def test_layers_that_change_at_the_very_end_want_training() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = Train(epochs=1, batch=16, lr=1e-4, device="cpu")
        cut = pliant.compress(trained(), DATA, "nrmf(search=1.0)", "params=0.3", train=plan)
    assert cut.report.verdict is not None and cut.report.verdict.holds is False
    assert any("nothing has trained them since" in text for text in cut.report.findings)


@pytest.mark.parametrize(
    ("losses", "guessing", "lost"),
    [
        ([0.1, 2.0, 2.2], math.log(10), True),
        ([0.1, 0.2, 0.3, 0.2, 0.2], math.log(10), False),
        ([2.0, 3.0, 4.0], math.log(10), False),  # knew nothing
        ([0.1, 9.0], math.log(10), False),  # one batch says little
        ([0.1, 9.0, 0.1, 0.1, 0.1, 0.1, 0.1], math.log(10), False),
        ([0.1, 2.0, 2.2], None, True),
        ([0.1, 2.0, math.nan], None, True),
        ([0.1, math.nan, math.nan], math.log(10), True),
        ([0.1, 0.5, 0.6], None, False),
        ([0.0, 0.5, 0.6], None, False),
    ],
)
def test_when_it_is_destroyed(losses: list[float], guessing: float | None, lost: bool) -> None:
    assert (early.destroyed(losses, guessing) is not None) is lost
