"""`compress` and `load`: the user's model is never touched, and the report is complete."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import pliant
from pliant.budget import Budget
from pliant.data import Data, Train
from pliant.edits import Factor
from pliant.errors import ArtifactError, BudgetError, ModelError
from pliant.files import artifact
from pliant.math.forms import max_ranks
from pliant.method import Method
from pliant.result import Report
from pliant.run import Run
from pliant.surgery.select import factorizable
from pliant.zoo import build

PLAN = Train(epochs=2, finetune=1, batch=16, lr=0.05)


@dataclass(frozen=True)
class Halve(Method):
    """Cuts every layer to half its output rank when the training is over."""

    share: float = 0.5

    def prepare(self, run: Run) -> None:
        run.state["began"] = float(torch.rand(1, generator=run.generator))
        for layer, reason in factorizable(run.model)[1].items():
            run.keep(layer, reason)

    def after_epoch(self, run: Run) -> None:
        run.note(began=run.state["began"])

    def finalize(self, run: Run) -> None:
        for layer, module in factorizable(run.model)[0].items():
            form = "svd" if isinstance(module, nn.Linear) else "output"
            rank = max(1, int(self.share * max_ranks(module.weight.shape, form)[0]))
            run.apply(Factor(layer, form, (rank,)))


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.Flatten(),
        nn.Linear(8 * 2 * 2, 4),
    )


def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = 0.3 * torch.randn(count, 1, 6, 6, generator=generator)
    images[torch.arange(count), 0, labels] += 1  # a bright row tells the class
    return images, labels


def data() -> Data:
    return Data(samples(48, 0), samples(16, 1), samples(20, 2), classes=4, name="rows")


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def history(report: Report) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in report.history]


def test_the_users_model_and_random_state_stay_as_they_were() -> None:
    model = net().eval()
    model[3].train()
    before, flags = state(model), [m.training for m in model.modules()]
    random = torch.get_rng_state()

    result = pliant.compress(model, data(), Halve(), train=PLAN)

    assert_same(before, state(model))
    assert flags == [m.training for m in model.modules()]
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert torch.equal(random, torch.get_rng_state())
    assert result.model is not model and not result.model.training


def test_the_report_tells_everything() -> None:
    result = pliant.compress(net(), data(), Halve(), "params=0.9", train=PLAN, seed=7, name="tiny")
    report = result.report

    assert (report.model, report.data, report.seed, report.device) == ("tiny", "rows", 7, "cpu")
    assert report.method == {"name": "Halve", "options": {"share": 0.5}}
    assert report.budget == {"params": 0.9} and report.met and not report.misses
    assert report.before.params == sum(p.numel() for p in net().parameters())
    assert report.after.params == sum(p.numel() for p in result.model.parameters())
    assert report.after.macs < report.before.macs and report.after.bytes < report.before.bytes
    assert report.after.accuracy is not None and report.after.accuracy > 0.5
    assert [row["phase"] for row in report.history if "phase" in row] == [
        "search", "search", "finetune",
    ]  # fmt: skip
    assert set(report.seconds) == {
        "prepare", "measure", "search", "finetune", "validate and finish",
    }  # fmt: skip
    assert report.train["epochs"] == 2 and report.train["scored_on"] == "20 samples of test"
    assert {"python", "torch", "machine"} <= set(report.versions)
    rows = {row.layer: row for row in report.layers}
    assert set(rows) == {"0", "1", "4", "6"}
    assert (rows["4"].form, rows["4"].ranks) == ("output", (4,))
    assert rows["6"].form == "svd" and not rows["6"].reason
    assert "no rank" in rows["0"].reason and rows["1"].reason
    assert Report.from_json(report.to_json()).to_json() == report.to_json()


def test_edits_are_a_plan_without_tensors() -> None:
    result = pliant.compress(net(), data(), Halve(), train=None)
    assert [edit.layer for edit in result.edits] == ["4", "6"]
    assert all(edit.kernels is None for edit in result.edits if isinstance(edit, Factor))


def test_the_same_seed_gives_the_same_network() -> None:
    torch.manual_seed(1)
    one = pliant.compress(net(), data(), Halve(), train=PLAN, seed=3)
    torch.manual_seed(2)
    two = pliant.compress(net(), data(), Halve(), train=PLAN, seed=3)
    assert_same(state(one.model), state(two.model))
    assert history(one.report) == history(two.report)


def test_without_training_nothing_but_the_method_changes_the_weights() -> None:
    result = pliant.compress(net(), None, Halve(1.0), example=torch.zeros(1, 1, 6, 6))
    x = samples(5, 9)[0]
    torch.testing.assert_close(result.model(x), net().eval()(x))
    assert result.report.data == "" and result.report.after.accuracy is None
    assert result.report.train == {} and set(result.report.seconds) == {
        "prepare", "measure", "factorize",
    }  # fmt: skip


def test_pairs_of_tensors_are_measured_on_their_last_tenth() -> None:
    result = pliant.compress(net(), samples(60, 0), Halve())
    assert result.report.train["scored_on"] == "6 samples of val"


def test_calibration_needs_no_labels() -> None:
    unlabelled = TensorDataset(samples(40, 0)[0])
    report = pliant.compress(net(), unlabelled, "energy(p=0.8, samples=16)").report
    assert report.after.accuracy is None and "scored_on" not in report.train
    assert report.after.params < report.before.params


def test_a_missed_budget_raises_or_is_reported() -> None:
    asked: dict[str, Any] = {"train": None, "example": (torch.zeros(1, 1, 6, 6),)}
    with pytest.raises(BudgetError, match="misses the budget: params is"):
        pliant.compress(net(), None, Halve(), Budget(params=100), **asked)
    report = pliant.compress(net(), None, Halve(), Budget(params=100), strict=False, **asked).report
    assert not report.met and "100 was allowed" in report.misses[0]


def test_several_methods_make_a_chain() -> None:
    method = ['energy(only=["4"])', 'energy(p=0.5, only=["6"])']
    report = pliant.compress(net(), data(), method).report
    assert [stage["method"]["name"] for stage in report.method["stages"]] == ["energy", "energy"]
    assert {row.layer: row.form for row in report.layers}["6"] == "svd"


# ---------------------------------------------------------------- the control


def test_the_control_is_the_same_training_without_the_method() -> None:
    report = pliant.compress(net(), data(), Halve(), train=PLAN, control=True).report
    plain = pliant.compress(
        net(), data(), Halve(1.0), train=Train(epochs=3, batch=16, lr=0.05)
    ).report
    control = [row for row in report.history if row.get("control")]

    assert [row["loss"] for row in control if "loss" in row] == [
        row["loss"] for row in plain.history if "loss" in row
    ]
    assert report.before.params == plain.before.params
    assert report.before.accuracy is not None and report.before.accuracy > 0.5
    assert "without compression" in report.train["reference"]
    spectra = [row["spectra"] for row in control if "spectra" in row]
    assert len(spectra) == 4 and set(spectra[0]) == {"4", "6"}
    assert len(spectra[0]["4"]["in"]) == len(spectra[0]["4"]["out"]) == 8


def test_the_trained_control_teaches() -> None:
    plan = Train(epochs=1, batch=16, lr=0.05, distill=0.9)
    alone = pliant.compress(net(), data(), Halve(), train=plan)
    taught = pliant.compress(net(), data(), Halve(), train=plan, control=True)
    assert not torch.equal(state(alone.model)["0.weight"], state(taught.model)["0.weight"])


# ---------------------------------------------------------------- resuming


def interrupting(phase: str, step: int) -> Callable[[dict[str, Any]], None]:
    def watch(row: dict[str, Any]) -> None:
        if row["phase"] == phase and row.get("step") == step:
            raise KeyboardInterrupt

    return watch


@pytest.mark.parametrize("phase, step", [("control", 4), ("search", 5), ("finetune", 2)])
def test_an_interrupted_call_goes_on_where_it_was(phase: str, step: int, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"train": PLAN, "control": True}
    whole = pliant.compress(net(), data(), Halve(), **asked)
    asked["folder"] = tmp_path
    with pytest.raises(KeyboardInterrupt):
        pliant.compress(net(), data(), Halve(), watch=interrupting(phase, step), **asked)
    seen: list[dict[str, Any]] = []
    result = pliant.compress(net(), data(), Halve(), resume=True, watch=seen.append, **asked)

    assert_same(state(whole.model), state(result.model))
    assert history(whole.report) == history(result.report)
    assert whole.report.before == result.report.before
    assert seen[0] == {"phase": "prepare"}
    assert sum("step" in row for row in seen) < 18, "what was done is not done again"


# ---------------------------------------------------------------- loading


def test_a_network_of_the_zoo_loads_without_its_architecture(tmp_path: Path) -> None:
    result = pliant.compress(build("lenet5"), None, Halve(), example=torch.zeros(1, 1, 28, 28))
    path = result.save(tmp_path / "model.pliant", source="lenet5")
    x = torch.rand(3, 1, 28, 28)
    assert torch.equal(pliant.load(path).eval()(x), result.model(x))


def test_the_number_of_classes_comes_from_the_file(tmp_path: Path) -> None:
    path = artifact.save(
        tmp_path / "m.pliant", build("lenet5", classes=7), (), source="lenet5", extra={"classes": 7}
    )
    assert pliant.load(path)(torch.rand(1, 1, 28, 28)).shape == (1, 7)


@pytest.mark.parametrize("classes", [0, -3, True, "7", 10**12])
def test_a_lie_about_the_classes_builds_nothing(classes: Any, tmp_path: Path) -> None:
    extra = {"classes": classes}
    path = artifact.save(
        tmp_path / "m.pliant", build("lenet5", classes=7), (), source="lenet5", extra=extra
    )
    with pytest.raises(ArtifactError):
        pliant.load(path)


@pytest.mark.parametrize("source", [None, "this:d", "tests.test_api:net", "lenet"])
def test_nothing_is_imported_because_a_file_says_so(source: str | None, tmp_path: Path) -> None:
    result = pliant.compress(net(), data(), Halve())
    path = result.save(tmp_path / "model.pliant", source=source)
    with pytest.raises(ArtifactError, match="holds no code"):
        pliant.load(path)
    x = samples(4, 5)[0]
    assert torch.equal(pliant.load(path, net).eval()(x), result.model(x))


# ---------------------------------------------------------------- names


def test_the_public_names_are_there_and_few() -> None:
    assert all(hasattr(pliant, name) for name in pliant.__all__)
    assert len(pliant.__all__) <= 34 and list(pliant.__all__) == sorted(pliant.__all__)
    assert pliant.method("energy(p=0.9)").p == 0.9


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = net()
    model.generator = (i for i in range(3))  # type: ignore[assignment]
    with pytest.raises(ModelError, match="must be copied"):
        pliant.compress(model, data(), Halve())


def test_an_elastic_file_that_was_compressed_further_has_one_size(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))

    data, train = (torch.randn(64, 32), torch.arange(64) % 4), Train(epochs=1, batch=16)
    first = pliant.compress(build(), data, "elastic(sizes=3, samples=16)", train=train)
    second = pliant.compress(first.model, data, "energy(p=0.3)")
    assert second.edits
    path = tmp_path / "a.pliant"
    artifact.save(path, second.model, (*first.edits, *second.edits))
    with pytest.raises(ArtifactError, match=r"a.pliant holds .* compressed further.*leave at= out"):
        pliant.load(path, build, at=0.3)
    assert torch.equal(pliant.load(path, build).eval()(data[0]), second.model(data[0]))
