"""Folders of images as they lie on disks: right, or refused in a sentence."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import pliant
from pliant.cli import app
from pliant.data import load
from pliant.errors import DataError


def png(path: Path, value: int, *, size: tuple[int, int] = (6, 6), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour: Any = value if mode in ("1", "L", "I;16") else (value, value // 2, 0)
    if mode == "I;16":
        Image.fromarray(np.full(size[::-1], value, np.uint16)).save(path)
    else:
        Image.new(mode, size, colour).save(path)
    return path


def classes(root: Path, count: int = 10, names: tuple[str, ...] = ("cat", "dog")) -> Path:
    for number, name in enumerate(names):
        for i in range(count):
            png(root / name / f"{i:02}.png", 100 * number + i)
    return root


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", "__MACOSX", ".git"])
def test_hidden_folders_are_no_classes(tmp_path: Path, hidden: str) -> None:
    classes(tmp_path / "train")
    png(tmp_path / "train" / hidden / "0.png", 7)
    png(tmp_path / "train" / "cat" / hidden / "0.png", 7)
    png(tmp_path / "val" / "dog" / "0.png", 7)
    (tmp_path / "val" / hidden).mkdir()
    (tmp_path / "train" / "cat" / "._00.png").write_bytes(b"left by a system")
    (tmp_path / "train" / "cat" / "Thumbs.db").write_bytes(b"left by a system")
    data = load(str(tmp_path))
    assert data.classes == ("cat", "dog")
    assert data.train[1].tolist() == [0] * 10 + [1] * 10
    assert data.val[1].tolist() == [1]


def test_an_empty_class_is_refused_since_it_moves_the_others(tmp_path: Path) -> None:
    classes(tmp_path / "train")
    (tmp_path / "train" / "ant").mkdir()
    with pytest.raises(DataError, match=r"ant has none.*numbers of the classes behind it"):
        load(str(tmp_path))
    (tmp_path / "train" / "ant").rmdir()
    (tmp_path / "test" / "cat").mkdir(parents=True)
    png(tmp_path / "test" / "dog" / "0.png", 1)
    assert load(str(tmp_path)).test[1].tolist() == [1]  # a class may have no image to test on


def test_grey_images_among_coloured_ones_are_in_colour(tmp_path: Path) -> None:
    classes(tmp_path / "train")
    png(tmp_path / "train" / "cat" / "00.png", 200, mode="L")
    png(tmp_path / "test" / "cat" / "0.png", 90, mode="L")
    png(tmp_path / "val" / "cat" / "0.png", 90)
    data = load(str(tmp_path))
    assert data.train[0].shape == (20, 3, 6, 6)
    assert (data.train[0][0] == 200).all()
    assert data.train[0][1, :, 0, 0].tolist() == [1, 0, 0]
    assert data.test[0].shape == (1, 3, 6, 6)


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path: Path) -> None:
    for i, value in enumerate((0, 257 * 100, 65535)):
        png(tmp_path / "train" / "a" / f"{i}.png", value, mode="I;16")
    png(tmp_path / "val" / "a" / "0.png", 257 * 10, mode="I;16")
    data = load(str(tmp_path))
    assert data.train[0].dtype == torch.uint8
    assert data.train[0][:, 0, 0, 0].tolist() == [0, 100, 255]
    assert data.val[0].flatten().unique().tolist() == [10]


def test_what_cannot_be_read_rightly_is_refused(tmp_path: Path) -> None:
    classes(tmp_path / "train")
    frames = [Image.new("RGB", (6, 6), (i, 0, 0)) for i in range(3)]
    frames[0].save(tmp_path / "train/cat/00.png", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match="3 frames"):
        load(str(tmp_path))
    png(tmp_path / "train" / "cat" / "00.png", 1)
    (tmp_path / "train" / "cat" / "x.gif").write_bytes(b"GIF89a")
    with pytest.raises(DataError, match=r"1 files ending in '.gif'.*convert them"):
        load(str(tmp_path))
    (tmp_path / "train" / "cat" / "x.gif").rename(tmp_path / "train" / "cat" / "00.PNG.txt")
    assert load(str(tmp_path)).size() == 18


def test_suffixes_in_capitals_and_folders_within_a_class(tmp_path: Path) -> None:
    classes(tmp_path / "train", 3)
    Image.new("RGB", (6, 6), (250, 0, 0)).save(tmp_path / "train" / "cat" / "A.JPEG")
    png(tmp_path / "train" / "dog" / "2024" / "june" / "0.png", 9)
    png(tmp_path / "val" / "dog" / "0.png", 9)
    assert load(str(tmp_path)).train[1].tolist() == [0] * 4 + [1] * 4


def test_classes_without_splits(tmp_path: Path) -> None:
    data = load(str(classes(tmp_path)))
    assert data.classes == ("cat", "dog")
    assert (data.size(), data.size("val"), data.has("test")) == (18, 2, False)
    for x, y in (data.train, data.val):
        assert torch.equal((x[:, 0, 0, 0] >= 100).long(), y)


def test_images_without_classes_have_no_labels(tmp_path: Path) -> None:
    for i in range(20):
        png(tmp_path / "all" / f"{i:02}.png", i)
        png(tmp_path / "kaggle" / "train" / f"{i:02}.png", i)
        png(tmp_path / "kaggle" / "test" / f"{i:02}.png", i)
    data = load(str(tmp_path / "all"))
    assert data.train.shape == (18, 3, 6, 6)
    assert len(next(data.batches("train", 4))) == 1
    kaggle = load(str(tmp_path / "kaggle"))
    assert kaggle.test.shape == (20, 3, 6, 6)  # no classes called train and test
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    result = pliant.compress(net, data, "energy(samples=16)", "params=0.8")
    assert result.report.before.accuracy is None


def test_resizing_is_an_option(tmp_path: Path) -> None:
    classes(tmp_path / "train")
    wide = tmp_path / "train" / "cat" / "00.png"
    Image.fromarray(np.arange(8 * 16, dtype=np.uint8).reshape(8, 16)).save(wide)
    with pytest.raises(DataError, match=r"one size.*size="):
        load(str(tmp_path))
    square = load(str(tmp_path), size=8)
    assert square.train[0].shape[-2:] == square.val[0].shape[-2:] == (8, 8)
    whole = torch.arange(8 * 16).view(8, 16)
    read = torch.cat([square.train[0], square.val[0]])
    assert any(torch.equal(image[0].long(), whole[:, 4:12]) for image in read)  # the middle
    assert load(str(tmp_path), size=(5, 7)).train[0].shape[-2:] == (5, 7)
    assert load(str(tmp_path), size=(5, 7)).resized == (5, 7)
    for wrong in (0, 2.5, (1, 2, 3), "8"):
        with pytest.raises(DataError, match="size must be"):
            load(str(tmp_path), size=wrong)  # type: ignore[arg-type]


def test_normalization_and_augmentation_are_options_with_defaults(tmp_path: Path) -> None:
    for i in range(10):
        png(tmp_path / "train" / "a" / f"{i}.png", 20 * i, size=(32, 32))
    plain = load(str(tmp_path))
    assert (plain.mean, plain.augment) == ((0.485, 0.456, 0.406), "crop-flip")
    own = load(str(tmp_path), normalize="data", augment="none")
    pixels = own.train[0].double() / 255
    assert own.augment == "none"
    assert own.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert own.std[:2] == pytest.approx(pixels.std((0, 2, 3)).tolist()[:2])
    bare = load(str(tmp_path), normalize="none")
    assert torch.equal(next(bare.batches("train", 9))[0], bare.train[0] / 255)
    with pytest.raises(DataError, match="normalize must be one of auto, imagenet"):
        load(str(tmp_path), normalize="zscore")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="augment must be one of"):
        load(str(tmp_path), augment="mixup")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="is a function"):
        load("some:thing", augment="none")
    grey = png(tmp_path / "grey" / "a" / "0.png", 5, mode="L").parents[1]
    with pytest.raises(DataError, match="three colours"):
        load(str(grey), normalize="imagenet")


def test_the_report_names_what_was_done_to_images(tmp_path: Path) -> None:
    for i in range(20):
        png(tmp_path / "train" / str(i % 2) / f"{i}.png", 10 * i, size=(40, 40))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    net.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)])
    data = load(str(tmp_path), size=32)
    report = pliant.compress(net, data, "energy(samples=16)", "params=0.8").report
    assert report.inputs == {
        "resized": "32x32",
        "normalized": "scaled to 0..1; mean 0.485, 0.456, 0.406, deviation 0.229, 0.224, 0.225",
        "augmented": "crop-flip",
    }
    assert "crop-flip" in pliant.render.markdown.markdown(report)
    assert pliant.result.Report.from_json(report.to_json()).inputs == report.inputs


def test_the_command_takes_the_options(tmp_path: Path) -> None:
    for i in range(20):
        png(tmp_path / "in" / "train" / str(i % 2) / f"{i}.png", 10 * i, size=(40, 40), mode="L")
    asked = ["compress", "lenet5", "--data", str(tmp_path / "in"), "--budget", "params=0.9"]
    asked += ["--epochs", "0", "--no-onnx", "--method", "energy(samples=8)", "--json"]
    asked += ["--out", str(tmp_path / "out"), "--allow-drop", "--no-control"]
    done = CliRunner().invoke(app, [*asked, "--size", "28", "--normalize", "none"])
    assert done.exit_code == 0, done.output
    assert '"resized": "28x28"' in done.output
    assert '"normalized": "scaled to 0..1"' in done.output
    wrong = CliRunner().invoke(app, [*asked, "--size", "tiny"])
    assert wrong.exit_code != 0
