"""Every refusal is one sentence that says what was expected, what came and what to do."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from typer.testing import CliRunner

import pliant
from pliant.cli import app
from pliant.codecs import container
from pliant.data import Data, Train
from pliant.edits import Factor
from pliant.errors import (
    BudgetError,
    ChainError,
    DataError,
    EditError,
    MethodError,
    ModelError,
    PliantError,
    TrainingError,
)
from pliant.method import Method
from pliant.registry import entries
from pliant.run import Run
from tests.counts import calls

SHORT = Train(epochs=1, batch=16, lr=0.05)
BAD_BUDGET: Any = 0.3


AT_ONCE = 100_000  # calls of functions, when all methods are imported


class Net(nn.Module):
    """Two convolutions and a head, for images 1x8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2)
        self.head = nn.Linear(8 * 3 * 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        out: Tensor = self.head(x.flatten(1))
        return out


def boom() -> Net:
    raise ValueError("no weights\nin a file.")


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def samples(count: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % 4


def data(**changes: Any) -> Data:
    return Data(**({"train": samples(), "val": samples(8), "classes": 4} | changes))


@dataclass(frozen=True)
class Never(Method):
    """Fails the test if it comes to any training."""

    def after_step(self, run: Run) -> None:
        raise AssertionError("trained before refusing")


def refused(kind: type[PliantError], says: str, call: Callable[[], Any]) -> str:
    """Check that a call refuses at once, in one sentence."""
    said: list[str] = []
    entries()

    def tried() -> None:
        with pytest.raises(kind) as caught:
            call()
        said.append(str(caught.value))

    work, text = calls(tried), said[0]
    assert work < AT_ONCE
    assert says in text and "\n" not in text.strip() and text.endswith((".", "?")), text
    return text


# ---------------------------------------------------------------- methods and budgets


@pytest.mark.parametrize(
    "method, says",
    [
        ("nrfm", "did you mean nrmf"),
        ("zzzzzz", "choose from"),
        ("nrmf(alhpa=1.0)", "did you mean alpha"),
        ("nrmf(alpha='much')", "alpha must be"),
        ("nrmf(1)", "write a name"),
        ("__import__('os')", "write a name"),
        (3, "not int"),
    ],
)
def test_an_unknown_method_or_option_names_the_nearest(method: Any, says: str) -> None:
    refused(MethodError, says, lambda: pliant.compress(net(), data(), method, train=SHORT))


def test_nothing_to_chain_is_refused() -> None:
    refused(ChainError, "at least one", lambda: pliant.compress(net(), data(), []))


@pytest.mark.parametrize("method", ["nrmf", "trp", "energy", "evbmf"])
def test_an_impossible_budget_is_refused_before_training(method: str) -> None:
    def watch(row: dict[str, Any]) -> None:
        assert "step" not in row, "trained before refusing"

    refused(
        BudgetError,
        "cannot be met",
        lambda: pliant.compress(net(), data(), method, "params=100", train=SHORT, watch=watch),
    )


def test_an_impossible_budget_says_what_is_reachable() -> None:
    text = refused(
        BudgetError,
        "params=100 (the least reachable is",
        lambda: pliant.compress(net(), data(), "nrmf", "params=100", train=SHORT),
    )
    least = int(text.split("reachable is ")[1].split(")")[0].replace(",", ""))
    result = pliant.compress(net(), data(), "nrmf(samples=0)", f"params={least}")
    assert result.report.after.params <= least


@pytest.mark.parametrize(
    "budget, says",
    [
        ("size=0.3", "axis"),
        ("params=lots", "expected a fraction"),
        ("params=-1", "positive"),
        ("latency=0.5", "needs a target to measure on"),
        (BAD_BUDGET, "not 0.3"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(budget: Any, says: str) -> None:
    refused(BudgetError, says, lambda: pliant.compress(net(), data(), "nrmf", budget, train=SHORT))


# ---------------------------------------------------------------- data


def spoilt(value: float) -> tuple[Tensor, Tensor]:
    images, labels = samples()
    images[5, 0, 0, 0] = value
    return images, labels


@pytest.mark.parametrize(
    "train, says",
    [
        ((torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long)), "at least one sample"),
        (spoilt(float("nan")), "the first is number 5"),
        (spoilt(float("inf")), "must be finite"),
        ((samples()[0], samples()[1] + 1), "must lie in 0..3"),
        ((samples()[0], samples()[1] - 1), "but -1 came"),
        ((samples()[0], samples()[1][:9]), "32 inputs and 9 labels"),
    ],
)
@pytest.mark.parametrize("plan", [SHORT, None])
def test_bad_samples_are_refused(train: Any, says: str, plan: Train | None) -> None:
    refused(DataError, says, lambda: pliant.compress(net(), data(train=train), Never(), train=plan))


def test_training_needs_a_training_split() -> None:
    only = Data(val=samples(), classes=4)
    call = lambda: pliant.compress(net(), only, Never(), train=SHORT)  # noqa: E731
    refused(DataError, "needs the train split", call)


@pytest.mark.parametrize("plan", [SHORT, None])
def test_inputs_of_another_shape_name_it(plan: Train | None) -> None:
    images = torch.rand(16, 3, 8, 8)
    wrong = data(train=(images, samples(16)[1]))
    refused(ModelError, "(1, 3, 8, 8)", lambda: pliant.compress(net(), wrong, Never(), train=plan))


@pytest.mark.parametrize(
    "example, says",
    [
        (samples()[0][:0], "at least one row, but its shape is (0, 1, 8, 8)"),
        (spoilt(float("nan"))[0], "must be finite"),
        ((spoilt(float("inf"))[0],), "must be finite"),
        ({"x": spoilt(float("nan"))[0]}, "must be finite"),
    ],
)
@pytest.mark.parametrize("method", ["energy", "magnitude", "nrmf", Never()])
def test_an_example_that_says_nothing_is_refused(method: Any, example: Any, says: str) -> None:
    call = lambda: pliant.compress(net(), None, method, "params=0.5", example=example)  # noqa: E731
    refused(DataError, says, call)


def test_a_mask_of_minus_infinity_is_an_example() -> None:
    model, mask = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.zeros(1, 4)
    mask[0, 3] = -float("inf")
    example = {"src": torch.rand(1, 4, 8), "src_key_padding_mask": mask}
    pliant.start(model, Never(), example=example)


def test_neither_data_nor_example_is_refused() -> None:
    refused(ModelError, "example=(inputs,)", lambda: pliant.compress(net(), None, Never()))


def test_a_plan_of_another_kind_is_refused() -> None:
    plan: Any = {"epochs": 3}
    refused(DataError, "not dict", lambda: pliant.compress(net(), data(), Never(), train=plan))


# ---------------------------------------------------------------- models


def broken() -> Net:
    model = net()
    with torch.no_grad():
        model.conv2.weight[1, 1, 1, 1] = float("nan")
    return model


@pytest.mark.parametrize("method", ["energy", "nrmf", Never()])
@pytest.mark.parametrize("plan", [SHORT, None])
def test_a_weight_that_is_not_finite_is_named(method: Any, plan: Train | None) -> None:
    call = lambda: pliant.compress(broken(), data(), method, train=plan)  # noqa: E731
    refused(ModelError, "conv2.weight of Net holds NaN", call)


def test_a_statistic_that_is_not_finite_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].running_var[2] = float("inf")
    call = lambda: pliant.start(model, Never(), example=(torch.rand(2, 4),))  # noqa: E731
    refused(ModelError, "1.running_var", call)


def test_a_buffer_may_hold_infinity_but_not_nan() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_buffer("least", torch.tensor(float("inf")))
    pliant.start(model, Never(), example=(torch.rand(2, 4),))
    model.least.fill_(float("nan"))
    call = lambda: pliant.start(model, Never(), example=(torch.rand(2, 4),))  # noqa: E731
    refused(ModelError, "least of Sequential", call)


def test_a_probe_does_not_look_at_what_is_not_finite() -> None:
    call = lambda: pliant.analyze(broken(), samples(), "output_sensitivity")  # noqa: E731
    refused(ModelError, "conv2.weight of Net holds NaN", call)


def test_the_command_that_inspects_names_it_too() -> None:
    result = cli("inspect", "tests.test_errors:broken", "--input", "1,8,8")
    assert result.exit_code == 2 and "conv2.weight of Net holds NaN" in result.stderr


class Failing(Net):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("the cable is loose")


def test_a_model_that_fails_in_forward_is_refused() -> None:
    call = lambda: pliant.compress(Failing(), data(), Never(), train=SHORT)  # noqa: E731
    assert "the cable is loose" in refused(ModelError, "fails", call)


def test_what_is_no_model_is_refused() -> None:
    model: Any = "lenet5"
    refused(ModelError, "not 'lenet5'", lambda: pliant.compress(model, data(), Never()))


@pytest.mark.parametrize("method", ["nrmf", "trp", "energy", "evbmf"])
def test_a_model_without_factorizable_layers_is_refused(method: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    call = lambda: pliant.compress(model, data(), method, train=SHORT)  # noqa: E731
    assert "single channel" in refused(ModelError, "no layer to factorize", call)


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 8, 3, padding=1)
        self.wide.weight = self.again.weight
        parametrizations.weight_norm(self.head)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide(self.again(torch.relu(self.conv1(x)))))
        out: Tensor = self.head(torch.relu(self.conv2(x)).flatten(1))
        return out


def test_tied_weights_are_left_alone_and_the_report_says_why() -> None:
    result = pliant.compress(Tied(), data(), "energy(p=0.5)", train=SHORT)
    rows = {row.layer: row for row in result.report.layers}
    assert rows["conv2"].form == "tucker2"
    assert "tied to wide.weight" in rows["again"].reason
    assert "tied to again.weight" in rows["wide"].reason
    assert {rows[name].form for name in ("again", "wide")} == {"dense"}
    assert rows["head"].form == "plain+svd"
    assert result.model.again.weight is result.model.wide.weight  # type: ignore[union-attr]


@dataclass(frozen=True)
class Force(Method):
    """Factorizes what it is told to, fit or not."""

    layer: str

    def finalize(self, run: Run) -> None:
        run.apply(Factor(self.layer, "svd" if self.layer == "head" else "output", (2,)))


@pytest.mark.parametrize("layer, says", [("again", "tied"), ("head", "parametrized")])
def test_forcing_them_is_an_edit_error(layer: str, says: str) -> None:
    refused(EditError, says, lambda: pliant.compress(Tied(), data(), Force(layer)))


# ---------------------------------------------------------------- training


def test_a_loss_that_is_not_finite_stops_and_names_the_layer(tmp_path: Path) -> None:
    plan = Train(epochs=4, batch=16, lr=1e18, schedule="constant", warmup=1)
    with pytest.raises(TrainingError) as caught:
        pliant.compress(net(), data(), "nrmf(search=1.0)", train=plan, folder=tmp_path)
    text = str(caught.value)
    assert "must stay finite" in text and "lower the learning rate" in text
    assert "conv" in text or "head" in text, "it names the layer"


# ---------------------------------------------------------------- the command line


def cli(*words: str) -> Any:
    return CliRunner().invoke(app, words)


QUICK = (
    "compress", "tests.test_errors:Digits", "--data", "digits", "--epochs", "0",
    "--method", "energy(p=0.5)", "--no-onnx",
)  # fmt: skip


class Digits(Net):
    """As `Net`, with ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8 * 3 * 3, 10)


@pytest.mark.parametrize(
    "words, says",
    [
        (("compress", "resnet21", "--data", "digits"), "resnet20"),
        (("compress", "nowhere:net", "--data", "digits"), "must name a module"),
        (("compress", "tests.test_errors:samples", "--data", "digits"), "must give a torch.nn"),
        (("compress", "missing.pliant", "--data", "digits"), "There is no file missing.pliant"),
        (("compress", "lenet5"), "Name the data"),
        (("compress", "lenet5", "--data", "digitz"), "did you mean digits"),
        (("compress", "lenet5", "--data", "digits", "--method", "nrfm"), "did you mean nrmf"),
        (("compress", "lenet5", "--data", "digits", "--lr", "-1"), "Train(lr=...) must be"),
        (("show", "enrgy"), "did you mean energy"),
        (("methods", "--family", "lorank"), "lowrank"),
        (("report", "nowhere"), "nowhere"),
        (("inspect", "tests.test_errors:Digits"), "--input"),
        (("inspect", "tests.test_errors:boom"), "'tests.test_errors:boom' must give a network"),
        (("inspect", "tests.test_errors:boom"), "raises ValueError: no weights in a file;"),
        (("inspect", "tests.test_errors:nowhere"), "AttributeError"),
        (("export", "lenet5", "--onnx", "nowhere/model.onnx"), "There is no folder nowhere"),
    ],
)
def test_the_command_line_refuses_in_one_sentence(
    words: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli(*words)
    assert result.exit_code == 2 and result.stdout == ""
    assert says in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("pliant.api.compress", broken)
    result = cli(*QUICK, "--out", "/tmp/never-made", "--force")
    assert isinstance(result.exception, ZeroDivisionError)


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years")
    result = cli(*QUICK, "--out", str(tmp_path))
    assert result.exit_code == 2 and "thesis.txt" in result.stderr and "--force" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = cli(*QUICK, "--out", str(tmp_path / "file" / "run"))
    assert result.exit_code == 2 and "cannot be written to" in result.stderr


def test_a_complete_run_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    result = cli(*QUICK, "--out", str(tmp_path), "--resume")
    assert result.exit_code == 2 and "nothing to resume" in result.stderr


def test_a_full_disk_leaves_no_broken_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, flags: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    assert cli(*QUICK, "--out", str(tmp_path)).exit_code == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(container, "_sync", full)
    result = cli(*QUICK, "--out", str(tmp_path), "--force", "--seed", "4")
    assert result.exit_code == 2 and "No space left on device" in result.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    words = [
        "compress", "tests.test_errors:Digits", "--data", "digits", "--epochs", "9999",
        "--method", "nrmf(samples=64)", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    code = "from pliant.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + 90
        while not (tmp_path / "run" / "checkpoint.pt").exists() and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert b"Traceback" not in said and b"the state is saved in" in said
    assert b"--method 'nrmf(samples=64)'" in said and b"--resume" in said
