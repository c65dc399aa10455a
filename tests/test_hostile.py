"""What comes from anybody's folder costs little, starts nothing, and is refused in words."""

import os
import random
from pathlib import Path

import pytest

from pliant.data import images, load
from pliant.errors import DataError
from tests.reliability import images as campaign


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def folder(root: Path, data: bytes, name: str = "x.png") -> Path:
    for label in "ab":
        (root / "train" / label).mkdir(parents=True)
        (root / "train" / label / "0.png").write_bytes(campaign.png())
    (root / "train" / "a" / name).write_bytes(data)
    return root


def test_a_good_folder_loads_and_a_hundred_hostile_ones_are_refused(tmp_path: Path) -> None:
    assert load(str(folder(tmp_path / "good", campaign.png(1)))).size() == 3
    (tmp_path / "bad").mkdir()
    found = campaign.run(100, tmp_path / "bad", seed=1)
    assert found == {"refused": 100, "loaded": 0, "opened": 0, "raw": 0}


def test_only_the_formats_meant_are_opened(tmp_path: Path) -> None:
    """Of an EPS nothing is read but its first bytes: no program is started for it."""
    marks = tmp_path / "mark"
    eps = campaign.EPS.replace(b"%s", os.fsencode(marks), 1)
    with pytest.raises(DataError, match=r"must be an image \(BMP, JPEG, PNG, WEBP\)"):
        load(str(folder(tmp_path / "eps", eps)))
    assert not marks.exists()


def test_a_large_picture_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"13000 x 13000 pixels, and 16,777,216 are allowed"):
        load(str(folder(tmp_path / "bomb", campaign.bomb(13_000, 13_000))))


def test_many_pictures_that_unpack_to_much_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "FREE", 10**5)
    monkeypatch.setattr(images, "GROWTH", 20)
    flat = [(f"{n}", campaign._saved(campaign.Image.new("L", (300, 300)), "PNG")) for n in range(9)]
    with pytest.raises(DataError, match=r"all would take more than .* bytes in memory"):
        images.decode(flat, "all", tmp_path)


@pytest.mark.timeout(10)
def test_pipes_and_devices_do_not_hang(tmp_path: Path) -> None:
    root = folder(tmp_path / "pipe", campaign.png())
    os.mkfifo(root / "train" / "b" / "9.png")
    with pytest.raises(DataError, match=r"9\.png must be an image, but cannot be read"):
        load(str(root))
    (tmp_path / "rows").mkdir()
    os.mkfifo(tmp_path / "rows" / "train.parquet")
    with pytest.raises(DataError, match="no regular file"):
        load(str(tmp_path / "rows"))


def test_links_stay_in_the_folder(tmp_path: Path) -> None:
    """Those within a folder are followed, and those of the cache of the Hugging Face hub."""
    root = folder(tmp_path / "set", campaign.png())
    (root / "train" / "b" / "1.png").symlink_to(root / "train" / "a" / "x.png")
    assert load(str(root)).size() == 4
    (tmp_path / "else.png").write_bytes(campaign.png())
    (root / "train" / "b" / "2.png").symlink_to(tmp_path / "else.png")
    with pytest.raises(DataError, match="a link that leads out of it"):
        load(str(root))
    hub = tmp_path / "hub"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots" / "1" / "data").mkdir(parents=True)
    (hub / "blobs" / "abc").write_bytes(b"")
    link = hub / "snapshots" / "1" / "data" / "train.parquet"
    link.symlink_to(hub / "blobs" / "abc")
    assert images.inside(link, hub / "snapshots" / "1") == hub / "blobs" / "abc"


def test_a_path_in_a_parquet_file_is_not_followed(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "else.png").write_bytes(campaign.png())
    cells = [{"bytes": campaign.png(), "path": None}, {"bytes": None, "path": "else.png"}]
    cells[1]["path"] = str(tmp_path / "else.png")
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    (tmp_path / "rows").mkdir()
    table = pyarrow.table({"image": pyarrow.array(cells, kind), "label": [0, 1]})
    pyarrow.parquet.write_table(table, tmp_path / "rows" / "train.parquet")
    with pytest.raises(DataError, match="a path in it is not followed"):
        load(str(tmp_path / "rows"))


def test_damaged_parquet_raises_nothing_else(tmp_path: Path) -> None:
    choose, good = random.Random(3), 0
    for number in range(30):
        root = campaign.parquet(tmp_path / str(number), choose, tmp_path / "ghost")
        try:
            load(str(root))
            good += 1
        except DataError:
            continue
    assert good < 30
