"""A loop of one's own gets the report that `compress` gives."""

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant.data import Train
from pliant.errors import AccuracyWarning, BudgetError, MethodError, ModelError
from pliant.result import Report
from tests.test_early import DATA, trained

BATCH, EPOCHS, LR = 16, 2, 0.01
PLAN = Train(
    epochs=EPOCHS, batch=BATCH, lr=LR, schedule="constant", momentum=0.0, nesterov=False,
    weight_decay=0.0, device="cpu",
)  # fmt: skip


def begun(net: nn.Module, budget: str = "params=0.8", data: pliant.Data = DATA) -> pliant.Run:
    optimizer = torch.optim.SGD(net.parameters(), LR)
    return pliant.start(
        net, pliant.method("nrmf"), pliant.Budget.parse(budget), data=data, optimizer=optimizer,
        steps=EPOCHS * 16, task="classification",
    )  # fmt: skip


def test_a_run_takes_text_and_data_as_people_have_it() -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*DATA.train), 32)
    run = pliant.start(trained(), "energy(p=0.8)", "params=0.8", data=loader)
    assert run.method == pliant.method("energy(p=0.8)")
    assert run.budget == pliant.Budget(params=0.8)
    assert run.data is not None and run.data.has("train")


@pytest.mark.parametrize(
    ("method", "budget", "error", "said"),
    [
        (type(pliant.method("energy")), None, MethodError, "must be a method, or text such as"),
        (7, None, MethodError, "not 7"),
        ("enrgy", None, MethodError, "energy"),
        ("energy(p=-1)", None, MethodError, "p"),
        ("energy", 0.3, BudgetError, "text such as 'params=0.3'"),
        ("energy", "params", BudgetError, "params"),
    ],
)
def test_what_a_run_cannot_take_is_said(
    method: Any, budget: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        pliant.start(trained(), method, budget, data=DATA)


def walk(run: pliant.Run) -> None:
    for epoch in range(EPOCHS):
        for batch in DATA.batches("train", BATCH, seed=0, epoch=epoch, shuffle=True, augment=True):
            for optimizer in run.optimizers:
                optimizer.zero_grad()
            run.task_loss(run.model(batch[0]), batch).backward()
            run.before_step()
            for optimizer in run.optimizers:
                optimizer.step()
            run.after_step()
        run.after_epoch()


def plain(report: Report) -> dict[str, Any]:
    """A report without what a clock or a loop of another kind writes."""
    left = ("seconds", "history", "train", "model", "device")
    return {key: value for key, value in asdict(report).items() if key not in left}


def test_a_plain_loop_gets_the_report_of_compress() -> None:
    dense = trained()
    whole = pliant.compress(dense, DATA, "nrmf", "params=0.8", train=PLAN, task="classification")
    net = copy.deepcopy(dense)
    run = begun(net)
    walk(run)
    mine = pliant.conclude(run, dense=dense)
    assert mine.model is net and not net.training and mine.edits == whole.edits
    same = zip(net.state_dict().values(), whole.model.state_dict().values(), strict=True)
    assert all(map(torch.equal, *zip(*same, strict=True)))
    found, expected = plain(mine.report), plain(whole.report)
    scored_on = "128 samples of test"
    assert found == expected and mine.report.verdict is not None and mine.report.verdict.holds
    assert mine.report.train["scored_on"] == whole.report.train["scored_on"] == scored_on
    assert Report.from_json(mine.report.to_json()).verdict == mine.report.verdict


def test_it_is_judged_and_shown(tmp_path: Path) -> None:
    dense = trained()
    net = copy.deepcopy(dense)
    run = begun(net, "params=0.3")
    walk(run)
    with torch.no_grad():
        run.finish()
        list(net.parameters())[0].zero_()
    with pytest.warns(AccuracyWarning, match="The smaller network lost"):
        mine = pliant.conclude(run, dense=dense, name="mine")
    assert mine.report.verdict is not None and mine.report.verdict.holds is False
    assert {path.name for path in mine.report.save(tmp_path)} == {
        "report.html", "report.json", "report.md",
    }  # fmt: skip
    assert "mine" in (tmp_path / "report.md").read_text()


def test_without_the_dense_network_costs_are_compared() -> None:
    net = trained()
    before = pliant.cost(net, DATA.example(1))
    run = begun(net)
    walk(run)
    mine = pliant.conclude(run, (torch.randn(4, 8), torch.arange(4)))
    assert mine.report.before.params == before.params > mine.report.after.params
    assert mine.report.before.accuracy is None and mine.report.verdict is not None
    assert mine.report.verdict.lost is None and mine.report.fidelity is None


def test_what_is_no_dense_network_is_refused() -> None:
    net = trained()
    run = begun(net)
    with pytest.raises(ModelError, match="must be a copy from before start"):
        pliant.conclude(run, dense=net, strict=False)


def test_a_missed_budget_is_said() -> None:
    net = trained()
    run = begun(net)
    walk(run)
    run.missed.append("params is 9 where 3 was allowed")
    with pytest.raises(BudgetError):
        pliant.conclude(run)
    assert not pliant.conclude(run, strict=False).report.met


def test_lightning_gets_it_too() -> None:
    pl = pytest.importorskip("lightning.pytorch")
    from pliant.drivers.lightning import PliantCallback

    dense = trained()
    run = begun(copy.deepcopy(dense))

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = run.model

        def training_step(self, batch: Any, index: int) -> Tensor:
            return run.task_loss(self.net(batch[0]), batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), LR)

    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[PliantCallback(run)],
    )  # fmt: skip
    inputs, labels = next(iter(DATA.batches("train", 256)))
    pairs = torch.utils.data.TensorDataset(inputs, labels)
    trainer.fit(Module(), torch.utils.data.DataLoader(pairs, BATCH))
    report = pliant.conclude(run, dense=dense).report
    assert report.met and report.verdict is not None and report.verdict.holds
    assert report.before.accuracy is not None and report.after.params < report.before.params
