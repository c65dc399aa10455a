"""Results show themselves, are logged where people look, and shared as people share."""

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import pliant
from pliant import zoo
from pliant.cli import app
from pliant.data import Data
from pliant.drivers import logs
from pliant.errors import ArtifactError, MissingExtraError, OutputError
from pliant.render.card import card
from pliant.result import Result


@pytest.fixture(scope="module")
def result(mnist5k: Data) -> Result:
    net = zoo.build("lenet5", weights="mnist5k")
    return pliant.compress(net, mnist5k, "energy", "params=0.8", name="lenet5")


def test_a_report_saves_itself(result: Result, tmp_path: Path) -> None:
    files = result.report.save(tmp_path / "run")
    assert sorted(file.name for file in files) == ["report.html", "report.json", "report.md"]
    read = pliant.Report.from_json((tmp_path / "run" / "report.json").read_text())
    assert read.after == result.report.after
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        result.report.save(tmp_path / "file")


def test_notebooks_show_verdict_and_numbers(result: Result) -> None:
    shown = result._repr_html_()
    assert shown == result.report._repr_html_()
    assert "Budget met" in shown and "<th>Parameters</th><td>61.7k</td>" in shown


def test_a_shared_folder_loads_with_a_card(result: Result, mnist5k: Data, tmp_path: Path) -> None:
    example = mnist5k.example()
    place = result.save_pretrained(tmp_path / "net", source="lenet5", onnx=example)
    assert {path.name for path in place.iterdir()} == {
        "model.pliant", "model.onnx", "config.json", "README.md",
        "report.html", "report.json", "report.md",
    }  # fmt: skip
    loaded = pliant.load(place)
    with torch.no_grad():
        assert torch.equal(loaded(*example), result.model(*example))
    front, _, card = (place / "README.md").read_text().partition("\n---\n")
    head = {line.partition(": ")[0]: line.partition(": ")[2] for line in front.splitlines()[1:]}
    assert json.loads(head["tags"]) == ["model-compression", "energy"]
    value = json.loads(head["model-index"])[0]["results"][0]["metrics"][0]["value"]
    assert value == result.report.after.accuracy and 'pliant.load("net", build)' in card
    settings = json.loads((place / "config.json").read_text())
    assert settings["pliant"]["budget"] == {"params": 0.8}
    with pytest.raises(ArtifactError, match=r"must hold a model\.pliant"):
        pliant.load(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(OutputError, match="would be lost"):
        result.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_card_names_the_metric_that_judges_and_quotes_its_folder(result: Result) -> None:
    after = replace(result.report.after, metrics={"mIoU": 0.5, "accuracy": 0.9})
    told = replace(result.report, after=after, task="segmentation")
    text = card(told, 'a"b')
    (head,) = (line for line in text.splitlines() if line.startswith("model-index"))
    (found,) = json.loads(head.partition(": ")[2])[0]["results"]
    assert found["task"] == {"type": "image-segmentation"}
    assert found["metrics"] == [{"type": "mIoU", "value": 0.5}]
    assert json.loads(text.rpartition("pliant.load(")[2].partition(", build")[0]) == 'a"b'


class Hub(BaseHTTPRequestHandler):
    """The few calls of a hub that an upload makes."""

    files: dict[str, bytes] = {}
    asked: list[str] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(self.path)
        if "token-bad" in self.headers.get("Authorization", ""):
            self.answer({"error": "who are you?"}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            where = f"http://{self.headers['Host']}/{asked['organization']}/{asked['name']}"
            self.answer({"url": where})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            self.answer({"files": modes})
        elif "/commit/" not in self.path:
            self.answer({})  # the card is checked there
        else:
            for line in body.decode().splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    content = base64.b64decode(row["value"]["content"])
                    self.files[row["value"]["path"]] = content
            where = f"http://{self.headers['Host']}/me/net/commit/1"
            self.answer({"commitUrl": where, "commitOid": "1"})

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.answer({"id": "me/net", "sha": "0", "siblings": []})

    def answer(self, value: Any, status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.files.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_folder_goes_to_a_hub(result: Result, hub: str, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    asked = {"endpoint": hub, "token": "hf_good"}
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "secret.env").write_text("TOKEN=1")
    where = result.push_to_hub("me/net", tmp_path / "net", source="lenet5", **asked)
    assert "secret.env" not in Hub.files
    assert where == f"{hub}/me/net/commit/1"
    assert Hub.files["model.pliant"] == (tmp_path / "net" / "model.pliant").read_bytes()
    assert {"README.md", "config.json", "report.json"} <= set(Hub.files)
    with pytest.raises(OutputError, match="me/net could not be uploaded"):
        result.push_to_hub("me/net", tmp_path / "net", endpoint=hub, token="token-bad")


def rows() -> list[dict[str, Any]]:
    return [
        {"step": 5, "epoch": 1, "loss": 0.5, "accuracy": 0.9, "phase": "train"},
        {"step": 10, "epoch": 2, "loss": float("nan"), "accuracy": 0.95},
        {"step": 5, "epoch": 1, "loss": 0.4, "control": True},
    ]


def test_rows_go_to_csv(tmp_path: Path) -> None:
    logs.write(logs.logger(f"csv:{tmp_path}", "run"), rows(), {"params": 3, "name": "net"})
    text = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()
    assert {"loss", "accuracy", "control/loss", "after/params"} <= set(text[0].split(","))
    assert [line.split(",")[-1] for line in text[1:]] == ["5", "10", "5", "10"]


def test_rows_go_to_tensorboard(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logs.write(logs.logger(f"tensorboard:{tmp_path}", "run"), rows(), {"params": 3})
    events = reader.EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("accuracy")] == [
        (5, 0.9),
        (10, 0.95),
    ]
    assert events.Scalars("after/params")[0].value == 3


@pytest.mark.slow  # MLflow is imported, and makes a store
@pytest.mark.filterwarnings("ignore")  # what MLflow says about itself
@pytest.mark.parametrize("store", ["sqlite:///{}/mlflow.db", "file:{}/mlruns"])
def test_rows_go_to_mlflow(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # which it asks for since version 3
    monkeypatch.chdir(tmp_path)
    place = store.format(tmp_path)
    logs.write(logs.logger(f"mlflow:{place}", "run"), rows(), {"params": 3, "name": "net"})
    client = mlflow.MlflowClient(tracking_uri=place)
    (run,) = client.search_runs([client.get_experiment_by_name("pliant").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    seen = client.get_metric_history(run.info.run_id, "accuracy")
    assert [(row.step, row.value) for row in seen] == [(5, 0.9), (10, 0.95)]
    assert run.data.metrics["control/loss"] == 0.4 and run.data.metrics["after/params"] == 3


def test_a_log_that_cannot_be_opened_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(place: str, name: str) -> logs.Logger:
        raise RuntimeError("no route to host")

    monkeypatch.setitem(logs._OPEN, "csv", closed)
    with pytest.raises(OutputError, match="x cannot be opened: no route to host"):
        logs.logger(f"csv:{tmp_path / 'x'}")


@pytest.mark.parametrize("kind", ["csv", "tensorboard"])
def test_a_folder_of_a_log_that_cannot_be_made_is_refused_before_the_work(
    kind: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        logs.check(f"{kind}:{tmp_path / 'file'}")


def test_a_log_that_takes_no_rows_leaves_the_run_as_it_is() -> None:
    class Full:
        def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
            raise OSError("disk full")

        def finalize(self, status: str) -> None:
            pass

    with pytest.raises(OutputError, match=r"disk full\); the run itself is whole"):
        logs.write(Full(), rows(), {})


@pytest.mark.slow  # W&B starts a process of its own
def test_rows_go_to_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in (("MODE", "offline"), ("SILENT", "true"), ("DIR", str(tmp_path))):
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.chdir(tmp_path)
    logs.write(logs.logger("wandb:project", "run"), rows(), {"params": 3})
    wandb.teardown()  # which waits until its process has written all
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    held = written.read_bytes()
    # The control's rows begin at an earlier step again, and must not be dropped for it.
    for wanted in (b"accuracy", b"control/loss", b"after/params", b"project"):
        assert wanted in held, f"{wanted!r} was not written"


def test_a_log_that_is_none_is_refused() -> None:
    with pytest.raises(OutputError, match="A log is one of csv"):
        logs.logger("paper:here")
    with pytest.raises(OutputError, match="csv:FOLDER"):
        logs.logger("csv")


def test_a_run_is_logged_by_one_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["compress", "lenet5", "--weights", "mnist5k", "--data", "mnist5k", "--epochs", "0"]
    asked += ["--method", "energy", "--budget", "params=0.8", "--no-onnx"]
    wrong = CliRunner().invoke(app, [*asked, "--out", str(tmp_path / "a"), "--log-to", "paper"])
    assert wrong.exit_code == 2 and "A log is one of csv" in wrong.output
    assert not (tmp_path / "a").exists()
    asked += ["--out", str(tmp_path / "run"), "--log-to", f"csv:{tmp_path / 'logs'}"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    head, last = (tmp_path / "logs" / "run" / "metrics.csv").read_text().splitlines()[:2]
    row = dict(zip(head.split(","), last.split(","), strict=True))
    assert float(row["after/accuracy"]) > 0.9 and float(row["after/params"]) < 50_000
    monkeypatch.setattr(logs, "logger", partial(_refused, "closed"))
    done = CliRunner().invoke(app, [*asked, "--force"])
    assert done.exit_code == 2 and "closed" in done.output and "Parameters" in done.output


def _refused(why: str, *where: str) -> None:
    raise OutputError(why)


@pytest.mark.parametrize("kind", ["mlflow", "wandb"])
def test_what_is_not_installed_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, kind, None)
    with pytest.raises(MissingExtraError, match=f"pip install {kind}"):
        logs.logger(kind)
