"""Files and folders of anybody's, checkpoints, locks: what must hold whatever happens to them."""

import os
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from typer.testing import CliRunner

import pliant
from pliant import zoo
from pliant.cli import app
from pliant.cli import folder as folders
from pliant.data import Data, Train
from pliant.data.digest import digest_of, digests
from pliant.drivers import checkpoint
from pliant.drivers.lock import NAME, owned
from pliant.edits import Insert, Nest, Rerank, Settle, replay
from pliant.errors import ArtifactError, OutputError, PliantError, TrainingError, shown
from pliant.files import artifact
from tests.counts import calls, largest
from tests.reliability import files, flips

PLAN = Train(epochs=2, batch=8, device="cpu", checkpoint_every=1)


class Stop(Exception):
    pass


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 4))


def pairs(seed: int = 0) -> tuple[Tensor, Tensor]:
    return torch.randn(48, 8, generator=torch.Generator().manual_seed(seed)), torch.arange(48) % 4


def compress(folder: Path, data: Any = None, *, stop: int = 0, **more: Any) -> Any:
    """Compress the small network; end after some steps, as a kill would."""
    steps: list[int] = []

    def watch(row: dict[str, Any]) -> None:
        steps.extend([1] if "step" in row else [])
        if stop and len(steps) == stop:
            raise Stop

    asked = {"model": net(), "train": PLAN, "folder": folder, "strict": False} | more
    model, method = asked.pop("model"), asked.pop("method", "nrmf")
    return pliant.compress(model, data or pairs(), method, "params=0.7", watch=watch, **asked)


def tensors(result: Any) -> list[Tensor]:
    return list(result.model.state_dict().values())


# ---------------------------------------------------------------- files


def test_a_small_file_that_names_a_large_network_builds_none(tmp_path: Path) -> None:
    path = artifact.save(tmp_path / "a.pliant", zoo.build("lenet5"), (), source="vgg16-bn")

    def load() -> None:
        with pytest.raises(ArtifactError, match="another architecture than this VGG"):
            pliant.load(path)

    assert largest(load) <= path.stat().st_size


def test_two_thousand_changed_files_hold_no_surprise(tmp_path: Path) -> None:
    found = files.run(2000, tmp_path, seed=5)
    assert found["raw"] == found["slow"] == 0
    assert found["loaded"] > 100 and found["refused"] > 1000
    assert max(found["largest tensor"], found["largest objects"]) <= 4  # of an honest one


@pytest.mark.parametrize(
    "edits",
    [
        [Settle("row.1", 10**6)],
        [Nest("first", "svd", (5,) * 20_000), Settle("row.1", 20_000)],
        [Insert("row", "conv", files.CONV | {"channels": 10**8})],
        [Insert("row", "scatter", {"places": (0,), "of": 2**20})] * 300,
        [Insert("row", "copy", {"start": "same"})] * 1000,
    ],
    ids=["settle", "nest", "channels", "scatter", "copies"],
)
@pytest.mark.parametrize("given", ["model", "function"])
def test_a_small_file_costs_little(edits: list[Any], given: str, tmp_path: Path) -> None:
    path = artifact.save(tmp_path / "a.pliant", files.built(), edits)
    model = files.built() if given == "model" else files.built

    def refused() -> None:
        with pytest.raises(ArtifactError, match="made to do harm"):
            pliant.load(path, model)

    assert calls(refused) < 10**7


def test_a_model_that_cannot_be_copied_is_tried_on_the_meta_device(tmp_path: Path) -> None:
    class Alone(files.Several):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("only one")

    path = artifact.save(tmp_path / "a.pliant", files.built(), [Settle("row.1", 10**6)])
    with pytest.raises(ArtifactError, match="made to do harm"):
        pliant.load(path, Alone)


def test_replaying_many_edits_takes_time_in_proportion() -> None:
    """What has been done is noted in the model without going through all of it."""

    def work(count: int) -> int:
        model = files.built()
        replay(model, [files.Factor("second", "svd", (5,))])
        edits = [Rerank("second", "svd", (3,))] * count
        return calls(lambda: replay(model, edits, weights=False))

    work(10)
    assert work(800) < 1.2 * 8 * work(100)


def test_a_manifest_that_unpacks_to_much_is_refused(tmp_path: Path) -> None:
    path = artifact.save(tmp_path / "a.pliant", files.built(), (), extra={"a": "x" * 2**21})
    assert artifact.inspect(path).extra["a"][:1] == "x"  # what is written can be read
    import zipfile

    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in held.items():
            archive.writestr(name, data)
    with pytest.raises(ArtifactError, match="unpacks to"):
        artifact.inspect(path)


@pytest.mark.timeout(20)
def test_pipes_in_the_place_of_files_do_not_hang(tmp_path: Path) -> None:
    pipe = tmp_path / "a.pliant"
    os.mkfifo(pipe)
    with pytest.raises(ArtifactError, match="no regular file"):
        pliant.load(pipe, files.built)
    os.mkfifo(tmp_path / checkpoint.NAME)
    with pytest.raises(ArtifactError, match="no regular file"):
        checkpoint.read(tmp_path, {})
    os.mkfifo(tmp_path / "report.json")
    with pytest.raises(ArtifactError, match="no regular file"):
        folders.read_report(tmp_path)


def test_names_cannot_steer_a_terminal(tmp_path: Path) -> None:
    name = "evil\x1b[2J\x07\u202e" + "n" * 10_000
    assert "\x1b" not in str(ArtifactError(name)) and len(str(ArtifactError(name))) < 500
    assert str(ArtifactError("schön → ✓")) == "schön → ✓" and shown("a\nb") == "a b"
    path = artifact.save(tmp_path / "a.pliant", files.built(), (), source="\x1b]0;x\x07")
    said = CliRunner().invoke(app, ["inspect", str(path)]).stderr
    assert "\x1b]" not in said and "\\x1b]0;x" in said


# ---------------------------------------------------------------- checkpoints


def test_no_single_bit_flips_unseen(tmp_path: Path) -> None:
    assert flips.run(200, tmp_path) == {"refused": 200, "taken": 0}


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("labels", {"data": (pairs()[0], 3 - pairs()[1])}),
        ("inputs", {"data": (pairs()[0] + (torch.arange(48) == 20)[:, None], pairs()[1])}),
        ("weights", {"model": net(1)}),
    ],
)
def test_a_checkpoint_of_other_data_or_weights_is_refused(
    what: str, other: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        compress(tmp_path, stop=5)
    with pytest.raises(TrainingError, match=f"its digest of the {what} is .* use the same {what}"):
        compress(tmp_path, resume=True, **other)


def test_one_label_of_many_is_seen() -> None:
    inputs, labels = torch.zeros(5000, 3), torch.zeros(5000).long()
    other = labels.clone()
    other[4321] = 1
    assert digests(Data((inputs, labels))) != digests(Data((inputs, other)))
    assert digests(Data((inputs, labels))) == digests(Data((inputs.clone(), labels)))
    assert digest_of(torch.zeros(2)) != digest_of(torch.zeros(2).double())


def test_another_number_of_threads_is_said(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        compress(tmp_path, stop=5)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(UserWarning, match=f"with {threads} threads and goes on with"):
            compress(tmp_path, resume=True)
    finally:
        torch.set_num_threads(threads)


class Noisy(Dataset[tuple[Tensor, int]]):
    """Adds noise to what it gives, from the random states of torch, NumPy and Python."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        import numpy as np

        return pairs()[0][row] + torch.rand(8) + np.random.rand() + random.random(), row % 4


@pytest.mark.parametrize("at", [2, 5, 7])
def test_a_data_set_that_draws_random_numbers_resumes_equal(at: int, tmp_path: Path) -> None:
    whole = compress(tmp_path / "whole", Noisy())
    with pytest.raises(Stop):
        compress(tmp_path / "cut", Noisy(), stop=at)
    again = compress(tmp_path / "cut", Noisy(), resume=True)
    assert all(map(torch.equal, tensors(whole), tensors(again)))


def test_beginning_anew_removes_the_old_checkpoint_first(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        compress(tmp_path, stop=5)
    assert (tmp_path / checkpoint.NAME).exists()
    with pytest.raises(Stop):
        compress(tmp_path, stop=1, train=Train(epochs=2, batch=8))  # before it has one of its own
    assert not (tmp_path / checkpoint.NAME).exists()


def test_force_removes_the_old_checkpoint_and_what_a_kill_left(tmp_path: Path) -> None:
    for name in (checkpoint.NAME, checkpoint.PART, ".model.pliant.0123abcd", ".report.md.0a1b2c3d"):
        (tmp_path / name).write_bytes(b"old")
    (tmp_path / ".model.onnx.a_b1c2d3").mkdir()
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / checkpoint.NAME).write_bytes(b"old")
    with folders.claimed(tmp_path, force=True, resume=False):
        assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- folders and threads


def test_one_writer_for_each_folder(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from pliant.drivers.lock import owned\n"
        "with owned(Path(sys.argv[1])):\n    print('mine', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "mine\n"
        with pytest.raises(OutputError, match=f"written to by process {other.pid} of .* since 20"):
            compress(tmp_path)
        other.send_signal(signal.SIGKILL)
        other.wait()
    finally:
        other.kill()
    assert (tmp_path / NAME).exists()  # it is left behind, and locks nobody out
    compress(tmp_path)
    assert not (tmp_path / NAME).exists()


def test_threads_do_not_share_a_folder(tmp_path: Path) -> None:
    said: list[str] = []

    def other() -> None:
        try:
            with owned(tmp_path):
                said.append("in")
        except PliantError as error:
            said.append(str(error))

    with owned(tmp_path), owned(tmp_path):  # the same one may ask twice
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "is being written to by process" in said[0]


def test_a_folder_that_cannot_be_written_to_is_found_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OutputError, match="cannot be written to"):
        compress(tmp_path / "file" / "run", stop=1)


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    words = ["compress", "lenet5", "--data", "digits", "--out", str(tmp_path / "a" / "b")]
    assert CliRunner().invoke(app, words).exit_code == 2  # of 8x8 pixels
    assert not list(tmp_path.iterdir())


def test_compressions_in_threads_give_what_they_give_alone() -> None:
    given = [(net(seed), pairs(seed)) for seed in range(3)]  # their own seeds are global ones

    def one(seed: int) -> list[Tensor]:
        plan = Train(epochs=1, batch=8, device="cpu")
        found = pliant.compress(
            *given[seed], "nrmf", "params=0.7", train=plan, seed=seed, strict=False
        )
        return tensors(found)

    alone = [one(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(one, range(3)))
    for mine, other in zip(alone, together, strict=True):
        assert all(map(torch.equal, mine, other))


@pytest.mark.parametrize("every", [None, 1])
def test_what_is_said_of_checkpoints_is_true(every: int | None, tmp_path: Path) -> None:
    plan = Train(epochs=2, batch=8, lr=1e37, device="cpu", checkpoint_every=every)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    with pytest.raises(TrainingError) as caught:
        compress(tmp_path, train=plan, model=model, method="magnitude")
    kept = (tmp_path / checkpoint.NAME).exists()
    assert ("the last good checkpoint is in" in str(caught.value)) == kept == (every is not None)
