"""The command line, in this process, on scikit-learn's digits and a tiny network."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import pliant
from pliant import registry
from pliant.cli import app, progress
from pliant.cli import compress as command
from pliant.cli.inspect import look
from pliant.data import Train
from pliant.errors import MissingExtraError
from pliant.files import artifact
from pliant.method import Method
from pliant.registry import Paper, register
from pliant.zoo import build


class Small(nn.Module):
    """Two convolutions and a head, for images 1x8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2)
        self.head = nn.Linear(16 * 3 * 3, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        out: Tensor = self.head(x.flatten(1))
        return out


def cli(*words: str | Path, code: int = 0) -> Any:
    if words[:1] == ("compress",) and code == 0:
        words = (*words, "--allow-drop")  # a few steps on a few samples
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exit_code != code and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


SMALL = ("compress", "tests.test_cli:Small", "--data", "digits")
QUICK = (*SMALL, "--epochs", "0", "--method", "energy(p=0.6)", "--no-onnx")
SIDES = {"params", "macs", "bytes", "latency_ms", "accuracy"}


def test_the_version() -> None:
    assert cli("--version").stdout.strip() == f"pliant {pliant.__version__}"


# ---------------------------------------------------------------- compress


def test_a_task_is_named_or_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    out = tmp_path / "run"
    cli(*QUICK, "--task", "none", "--out", out)
    report = json.loads((out / "report.json").read_text())
    assert report["task"] == "none" and report["before"]["accuracy"] is None
    assert report["fidelity"]["samples"] > 100 and report["fidelity"]["agreement"] is not None
    cli(*QUICK, "--out", out, "--force")
    report = json.loads((out / "report.json").read_text())
    assert report["task"] == "classification(axis=1)" and report["before"]["metrics"]["accuracy"]
    other = ("compress", "nothing:at_all", "--data", "nowhere", "--task", "segmantation")
    assert "did you mean 'segmentation'" in cli(*other, "--out", tmp_path / "a", code=2).output
    wrong = cli(*QUICK, "--task", "regression", "--out", tmp_path / "b", code=2).output
    assert "shape of the outputs" in " ".join(wrong.split())


def test_a_run_leaves_a_network_and_a_report(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("--epochs", "1", "--lr", "0.05", "--method", "nrmf(samples=64)")
    said = cli(*SMALL, *words, "--budget", "params=0.5", "--out", out, "--no-onnx").stdout

    names = {path.name for path in out.iterdir()}
    assert names == {"report.json", "report.html", "report.md", "model.pliant"}
    assert all(str(out / name) in said for name in names)
    assert "Accuracy" in said and "Budget met" in said and "conv2" in said
    report = json.loads((out / "report.json").read_text())
    assert set(report["before"]) > SIDES and set(report["after"]) > SIDES
    assert report["met"] is True and report["seed"] == 0 and report["budget"] == {"params": 0.5}
    assert report["model"] == "Small" and report["data"] == "digits"
    assert {"form", "ranks", "kept", "reason"} < set(report["layers"][0])
    assert report["method"]["options"]["samples"] == 64
    assert report["after"]["params"] <= 0.5 * report["before"]["params"]
    model = pliant.load(out / "model.pliant", Small)
    assert sum(p.numel() for p in model.parameters()) == report["after"]["params"]


def test_json_is_all_that_a_script_sees(tmp_path: Path) -> None:
    result = cli(*QUICK, "--out", tmp_path, "--json")
    printed = json.loads(result.stdout)
    assert result.stderr == "" and "history" not in printed
    assert printed["files"][-1] == str(tmp_path / "model.pliant")
    assert printed["after"]["params"] < printed["before"]["params"]


def test_the_file_knows_what_its_inputs_are(tmp_path: Path) -> None:
    cli(*QUICK, "--out", tmp_path)
    manifest = artifact.inspect(tmp_path / "model.pliant")
    assert manifest.source == "tests.test_cli:Small"
    assert manifest.extra["input"] == [1, 8, 8] and manifest.extra["classes"] == 10
    assert len(manifest.extra["mean"]) == 1 and manifest.extra["class_names"][3] == "3"


def test_a_compressed_file_is_compressed_further(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    cli(*QUICK, "--out", first, "--method", 'energy(p=0.6, only=["conv2"])')
    again = ("compress", first / "model.pliant", "--architecture", "tests.test_cli:Small")
    rest = ("--data", "digits", "--epochs", "0", "--no-onnx", "--method")
    cli(*again, *rest, 'energy(p=0.5, only=["head"])', "--out", second)

    layers = [edit.layer for edit in artifact.inspect(second / "model.pliant").edits]
    assert layers == ["conv2", "head"]
    before = json.loads((first / "report.json").read_text())["after"]["params"]
    report = json.loads((second / "report.json").read_text())
    assert report["before"]["params"] == before > report["after"]["params"]
    pliant.load(second / "model.pliant", Small)


def test_a_file_alone_needs_its_architecture(tmp_path: Path) -> None:
    cli(*QUICK, "--out", tmp_path)
    words = ("compress", tmp_path / "model.pliant", "--data", "digits")
    assert "--architecture" in cli(*words, code=2).stderr


def test_a_network_of_the_zoo_takes_its_weights_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(9)
    dense = build("lenet5")
    save_file(dense.state_dict(), tmp_path / "w.safetensors")
    words = ("compress", "lenet5", "--data", "mnist5k", "--weights", tmp_path / "w.safetensors")
    rest = ("--epochs", "0", "--method", 'energy(only=["fc1"])', "--no-onnx", "--out")
    cli(*words, *rest, tmp_path / "run")
    model = pliant.load(tmp_path / "run" / "model.pliant")
    assert torch.equal(model.conv1.weight, dense.conv1.weight)  # type: ignore[union-attr]
    assert "reference" not in json.loads((tmp_path / "run/report.json").read_text())["train"]


def test_modules_of_the_current_folder_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets_of_mine.py").write_text("from tests.test_cli import Small as mine\n")
    monkeypatch.chdir(tmp_path)
    cli("compress", "nets_of_mine:mine", *QUICK[2:])
    assert (tmp_path / "runs" / "mine-energy" / "model.pliant").exists()


@pytest.fixture
def small_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo with a smaller network, less data and fewer epochs."""
    demo = command.Demo("tests.test_cli:Small", "digits", "nrmf(samples=64)", train=Train(epochs=1))
    monkeypatch.setattr(command, "DEMO", demo)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "demo"


def _words(said: str) -> str:
    return " ".join(said.split())


def test_the_demo_replaces_only_itself(small_demo: Path) -> None:
    for _ in range(2):
        cli("compress", "--control", "--no-onnx")
    report = json.loads((small_demo / "report.json").read_text())
    assert "without compression" in report["train"]["reference"]
    assert f"Before: {report['train']['reference']}." in _words(cli("report", small_demo).stdout)
    assert any(row.get("control") and "spectra" in row for row in report["history"])
    (small_demo / "thesis.txt").write_text("three years")
    assert "thesis.txt" in cli("compress", "--no-onnx", code=2).stderr
    cli("compress", "--no-onnx", "--force", "--epochs", "0")
    assert (small_demo / "thesis.txt").exists()


def test_a_stopped_run_goes_on_with_the_command_it_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*SMALL, "--epochs", "2", "--control", "--no-onnx", "--method", "nrmf(samples=64)")
    cli(*words, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:

        def stop(self: progress.Bars, row: dict[str, Any]) -> None:
            if row["phase"] == "search" and row.get("step") == 15:
                raise KeyboardInterrupt

        patch.setattr(progress.Bars, "watch", stop)
        said = cli(*words, "--out", tmp_path / "run", "--force", code=130).stderr
    assert (tmp_path / "run" / "checkpoint.pt").exists() and "state is saved" in said
    printed = shlex.split(said.splitlines()[-1])
    assert printed[0] == "pliant" and printed[-1] == "--resume" and "--force" not in printed
    cli(*printed[1:])

    weights = [
        pliant.load(tmp_path / name / "model.pliant", Small).state_dict()
        for name in ("whole", "run")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "report.json", "report.html", "report.md", "model.pliant",
    }  # fmt: skip


def test_a_missing_extra_costs_the_onnx_file_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(module: str, extra: str) -> None:
        raise MissingExtraError(f'{module} is needed: pip install "pliant[{extra}]".')

    monkeypatch.setattr("pliant.files.onnx.require", missing)
    (tmp_path / "model.onnx").write_text("of an earlier run")
    result = cli(*QUICK[:-1], "--out", tmp_path, "--force")
    assert "pliant[onnx]" in result.stderr
    assert not (tmp_path / "model.onnx").exists() and (tmp_path / "model.pliant").exists()
    report = json.loads((tmp_path / "report.json").read_text())
    assert "pliant[onnx]" in report["export"]["onnx"]["not_written"]


def test_a_run_stopped_while_it_is_written_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    words = (*SMALL, "--epochs", "1", "--no-onnx", "--method", "energy(p=0.6)", "--out", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("pliant.cli.folder.write_reports", stop)
        said = cli(*words, code=130).stderr
    assert (tmp_path / "model.pliant").exists() and "state is saved" in said
    cli(*shlex.split(said.splitlines()[-1])[1:])
    assert (tmp_path / "report.json").exists()


@dataclass(frozen=True)
class Idle(Method):
    """Does nothing, so it misses every budget."""


@pytest.fixture
def idle() -> Iterator[None]:
    register("idle", paper=Paper("t", "a", "v", 2020), saves="params")(Idle)
    yield
    del registry._ENTRIES["idle"]


def test_a_missed_budget_is_written_and_fails(tmp_path: Path, idle: None) -> None:
    words = (*SMALL, "--epochs", "0", "--no-onnx", "--method", "idle", "--budget", "params=0.5")
    result = cli(*words, "--out", tmp_path, code=2)
    assert "misses the budget" in result.stderr and "Budget missed" in result.stdout
    assert json.loads((tmp_path / "report.json").read_text())["met"] is False


# ---------------------------------------------------------------- what there is


def test_methods_are_listed(idle: None) -> None:
    rows = {row["name"]: row for row in json.loads(cli("methods", "--json").stdout)}
    assert {"nrmf", "trp", "energy", "evbmf"} < set(rows)
    assert set(rows["nrmf"]) == {"name", "family", "verb", "saves", "paper"}
    assert rows["nrmf"]["saves"] == ["params", "macs", "bytes", "latency"]
    assert rows["nrmf"]["paper"]["year"] == 2020 and rows["nrmf"]["verb"] == "compress"
    listed = json.loads(cli("methods", "--family", "lowrank", "--json").stdout)
    assert "idle" not in {row["name"] for row in listed} and "nrmf" in cli("methods").stdout


def test_a_method_is_shown_with_its_options() -> None:
    said = cli("show", "nrmf").stdout
    assert "Exploiting Elasticity" in said and "interval" in said and "Saves" in said
    shown = json.loads(cli("show", "nrmf", "--json").stdout)
    options = {row["name"]: row for row in shown["options"]}
    assert options["p"]["type"] == "float in 0..1" and options["p"]["default"] == 0.95
    assert "energy kept" in options["p"]["text"]
    assert options["exclude"]["default"] == []


# ---------------------------------------------------------------- inspect


def planted() -> nn.Module:
    """A network whose conv2 has rank 3 over its outputs and 2 over its inputs."""
    torch.manual_seed(0)
    model = Small()
    with torch.no_grad():
        core = torch.randn(3, 2, 3, 3)
        ends = torch.randn(16, 3), torch.randn(2, 8)
        model.conv2.weight.copy_(torch.einsum("tr,rsxy,sc->tcxy", ends[0], core, ends[1]))
    return model


def test_ranks_and_savings_of_every_layer() -> None:
    rows = {row["layer"]: row for row in look(planted(), (torch.zeros(1, 1, 8, 8),))}
    assert rows["conv1"]["reason"] == "a single channel has no rank to lower"
    conv = rows["conv2"]
    assert conv["form"] == "tucker2" and conv["kernel"] == [16, 8, 3, 3]
    assert len(conv["spectrum"]["in"]) == 8 and len(conv["spectrum"]["out"]) == 16
    assert conv["full"] == [8, 16]
    ranks = conv["ranks"]
    assert ranks["p=0.98"]["ranks"][0] <= 2 and ranks["p=0.98"]["ranks"][1] <= 3
    assert ranks["evbmf"]["ranks"] == [2, 3]
    # by hand: 8*2 + 2*3*9 + 3*16 weights and 16 biases, of 16*8*9 + 16
    assert ranks["evbmf"]["params"] == 16 + 54 + 48 + 16
    assert ranks["evbmf"]["saved"] == round(1 - 134 / 1168, 4)
    assert ranks["evbmf"]["macs"] == 16 * 64 + 54 * 9 + 48 * 9
    # by hand: 7/14 gives 56 + 882 + 224 = 1162 > 1152, 6/13 (13 of 16) 48 + 702 + 208 = 958
    assert ranks["break_even"]["ranks"] == [6, 13] and 0 < ranks["break_even"]["saved"] < 1
    head = rows["head"]  # 144 -> 10 pays below 1440 / 154 = 9.35
    assert head["form"] == "svd" and head["ranks"]["break_even"]["ranks"] == [9]


def test_inspect_prints_a_table() -> None:
    said = cli("inspect", "tests.test_cli:Small", "--input", "1,8,8").stdout
    assert "conv2" in said and "█" in said and "no rank to lower" in said
    rows = json.loads(cli("inspect", "lenet5", "--json").stdout)
    assert rows["params"] == 61_706 and [row["layer"] for row in rows["layers"]] == [
        "conv1", "conv2", "fc1", "fc2", "fc3",
    ]  # fmt: skip
    with_data = cli("inspect", "tests.test_cli:Small", "--data", "digits", "--json").stdout
    assert json.loads(with_data)["macs"] > 0


# ---------------------------------------------------------------- report, export


def test_a_report_is_rendered_anew(tmp_path: Path) -> None:
    cli(*QUICK, "--out", tmp_path)
    pages = [tmp_path / "report.html", tmp_path / "report.md"]
    texts = [page.read_text() for page in pages]
    for page in pages:
        page.unlink()
    said = cli("report", tmp_path).stdout
    assert [page.read_text() for page in pages] == texts and "Accuracy" in said
    assert json.loads(cli("report", tmp_path / "report.json", "--json").stdout)["seed"] == 0
    (tmp_path / "report.json").write_text('{"before": 3}')
    assert "must be a report" in cli("report", tmp_path, code=2).stderr


def test_onnx_is_written_and_compared(tmp_path: Path) -> None:
    """Takes seconds: PyTorch's exporter does."""
    pytest.importorskip("onnxruntime")
    cli(*QUICK[:-1], "--out", tmp_path)
    onnx = json.loads((tmp_path / "report.json").read_text())["export"]["onnx"]
    assert onnx["path"] == "model.onnx" and onnx["max_difference"] < 1e-4
    assert onnx["bytes"] == (tmp_path / "model.onnx").stat().st_size
    words = ("export", tmp_path / "model.pliant", "--architecture", "tests.test_cli:Small")
    found = json.loads(cli(*words, "--onnx", tmp_path / "again.onnx", "--json").stdout)
    assert Path(found["path"]).exists() and found["opset"] == onnx["opset"]
    again = cli(*words, "--onnx", tmp_path / "again.onnx", "--json", "--force").stdout
    assert json.loads(again) == found


def test_an_export_does_not_write_over_what_exists(tmp_path: Path) -> None:
    cli(*QUICK, "--out", tmp_path)
    file, link, text = (tmp_path / name for name in ("model.pliant", "link", "keep.txt"))
    old = file.read_bytes()
    link.symlink_to(file)
    text.write_text("three years")
    words = ("export", file, "--architecture", "tests.test_cli:Small", "--input", "1,8,8")
    for place in (file, link):
        said = cli(*words, "--onnx", place, "--force", code=2).stderr
        assert "is the network that is exported" in said
    weights = tmp_path / "weights.safetensors"
    save_file(Small().state_dict(), weights)
    dense = ("export", "tests.test_cli:Small", "--weights", weights, "--input", "1,8,8")
    assert "is exported" in cli(*dense, "--onnx", weights, "--force", code=2).stderr
    assert "add --force" in cli(*words, "--onnx", text, code=2).stderr
    assert "another kind of file" in cli(*words, "--onnx", text, "--force", code=2).stderr
    assert file.read_bytes() == old and text.read_text() == "three years"


def test_a_run_does_not_begin_where_its_network_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "model.pliant").write_text("three years")
    assert "another kind of file" in cli(*QUICK, "--out", tmp_path, "--force", code=2).stderr


# ---------------------------------------------------------------- progress


def test_bars_follow_the_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    row = {"epoch": 1, "epochs": 2, "loss": 0.5, "lr": 0.1, "seconds_left": 3.0, "steps": 4}
    with progress.Bars(quiet=False) as bars:
        bars.watch({"phase": "prepare"})
        for step in (1, 2, 3):
            bars.watch({"phase": "search", "step": step, **row})
        shown = {task.description: task for task in bars.progress.tasks}
        searching = shown["training with the method"]
        assert (searching.completed, searching.total) == (3, 4)
        assert (
            searching.fields["left"] == "3 s left" and not shown["looking at the network"].visible
        )
        bars.watch({"phase": "measure"})
        assert searching.finished


@pytest.mark.parametrize(("quiet", "said"), [(True, ""), (False, "looking at the network\n")])
def test_nothing_is_drawn_where_nobody_looks(
    quiet: bool, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines for a log, and with --json nothing at all."""
    with progress.Bars(quiet=quiet) as bars:
        bars.watch({"phase": "prepare"})
    assert capsys.readouterr() == ("", said)


def test_a_loss_of_accuracy_has_an_exit_code_of_its_own(tmp_path: Path) -> None:
    """Half of the right answers are gone: the budget is met, and no script takes it for good."""
    words = [*SMALL, "--epochs", "3", "--lr", "0.05", "--control", "--no-onnx"]
    words += ["--method", "energy(p=0.05, recalibrate=False)"]
    run = CliRunner().invoke(app, [str(w) for w in (*words, "--out", tmp_path / "a")])
    assert run.exit_code == 3, run.output
    assert "Accuracy lost" in run.stdout and "points" in run.stderr
    verdict = json.loads((tmp_path / "a" / "report.json").read_text())["verdict"]
    assert verdict["holds"] is False and verdict["lost"] > verdict["bound"] == 2.0
    assert verdict["low"] < verdict["lost"] < verdict["high"] and verdict["samples"] > 100
    allowed = [*words, "--out", tmp_path / "b", "--allow-drop"]
    assert CliRunner().invoke(app, [str(w) for w in allowed]).exit_code == 0
    wide = [*words, "--out", tmp_path / "c", "--lose", "100"]
    run = CliRunner().invoke(app, [str(w) for w in wide])
    assert run.exit_code == 0 and "Accuracy kept" in run.stdout


def test_a_control_that_would_train_nothing_is_refused() -> None:
    result = CliRunner().invoke(app, [*SMALL, "--epochs", "0", "--control"])
    assert result.exit_code and "add --epochs" in result.stderr.replace("\n", " ")


class Pictures(nn.Module):
    """A convolution and a head, for images in colour, 3x8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 6 * 6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.conv(x).relu().flatten(1))
        return out


def test_every_command_that_reads_data_prepares_images_alike(tmp_path: Path) -> None:
    for i in range(20):
        place = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10 + i % 3, 12), (9 * i, 50, 99)).save(place)
    given = ("tests.test_cli:Pictures", "--data", tmp_path / "images", "--size", "8")
    assert "--size" in cli("sweep", *given[:3], "--method", "energy", code=2).output
    energy = ("--method", "energy(p=0.6)", "--normalize", "none")
    cli("sweep", *given, *energy, "--out", tmp_path / "sweep")
    found = [json.loads(p.read_text()) for p in (tmp_path / "sweep").rglob("report.json")]
    assert [one["inputs"]["normalized"] for one in found] == ["scaled to 0..1"]
    rows = json.loads(cli("inspect", *given, "--json").stdout)
    assert rows["layers"]
    told = cli("analyze", *given, "--augment", "none", "--json").stdout
    assert json.loads(told)["model"]
    assert "--augment" in cli("auto", "--help").stdout
