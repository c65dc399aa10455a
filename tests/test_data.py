import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import needs_data
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from pliant.data import Data, Train, load, unpack
from pliant.data.sources import crop_flip
from pliant.errors import DataError


def pair(count: int = 40, classes: int = 4) -> tuple[Tensor, Tensor]:
    return torch.arange(count * 3.0).view(count, 3), torch.arange(count) % classes


def images(count: int = 10, size: int = 32) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=noise)
    return pixels, torch.arange(count) % 2


def firsts(batches: Any) -> list[int]:
    """The samples in a list of batches, told by their first input."""
    return [int(x) // 3 for inputs, _ in batches for x in inputs[:, 0]]


class Squares(Dataset):
    def __init__(self, *, noisy: bool = False) -> None:
        self.noisy = noisy

    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        noise = torch.rand(1).item() + np.random.rand() + random.random() if self.noisy else 0
        return torch.tensor([3.0 * i + noise / 3, i]), i % 2


class Named(Squares):
    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.full((2,), i * 3.0), "labels": torch.tensor(i % 2)}


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([(torch.tensor([3.0 * i]), 0) for i in range(6)])


# ---------------------------------------------------------------- Data.of


def test_pair_is_divided_by_a_seeded_permutation() -> None:
    data = Data.of(pair())
    assert (data.size(), data.size("val"), data.has("test"), data.classes) == (36, 4, False, 4)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(data.val[0], pair()[0][order[-4:]])
    assert torch.equal(data.train[1], pair()[1][order[:-4]])
    assert not torch.equal(Data.of(pair(), seed=1).val[0], data.val[0])


def test_of_takes_arrays_loaders_data_sets_and_nothing() -> None:
    arrays = Data.of((np.random.rand(5, 2), np.arange(5)))
    assert arrays.train[0].dtype == torch.float32
    assert not arrays.has("val")
    assert Data.of(arrays) is arrays
    assert not Data.of(None).has("train")
    loader = DataLoader(Squares(), 4)
    assert Data.of(loader).train is loader
    data = Data.of(Squares())
    assert (data.size(), data.size("val")) == (18, 2)
    assert Data.of([(torch.zeros(2, 3), torch.zeros(2))] * 3).steps(1) == 3


@pytest.mark.parametrize("wrong", [3, "mnist5k", object(), {"train": 1}])
def test_of_refuses_the_rest(wrong: Any) -> None:
    with pytest.raises(DataError, match="a pair of tensors"):
        Data.of(wrong)


# ---------------------------------------------------------------- batches


def test_batches_are_a_function_of_seed_and_epoch() -> None:
    data = Data(pair())

    def order(seed: int, epoch: int) -> list[int]:
        return firsts(data.batches("train", 7, seed=seed, epoch=epoch, shuffle=True))

    state = torch.get_rng_state()
    assert order(0, 1) == order(0, 1)
    assert sorted(order(0, 1)) == list(range(40))
    assert len({tuple(order(s, e)) for s in range(3) for e in range(3)}) == 9
    assert firsts(data.batches("train", 7)) == list(range(40))
    assert torch.equal(state, torch.get_rng_state())


def test_resuming_within_an_epoch_gives_the_rest() -> None:
    data = Data(images(), augment="crop-flip")
    options: dict[str, Any] = dict(seed=3, epoch=2, augment=True, shuffle=True)
    all_of_it = list(data.batches("train", 3, **options))
    rest = list(data.batches("train", 3, start=2, **options))
    assert len(all_of_it) == data.steps(3) == 4
    for (x, y), (a, b) in zip(all_of_it[2:], rest, strict=True):
        assert torch.equal(x, a)
        assert torch.equal(y, b)


@pytest.mark.parametrize("count", [40, 41, 3])
def test_ranks_share_an_epoch_evenly(count: int) -> None:
    data = Data(pair(count), val=pair(count))
    shares = [
        list(data.batches("train", 8, epoch=1, shuffle=True, rank=r, world=4)) for r in range(4)
    ]
    assert {len(share) for share in shares} == {data.steps(8, world=4)}
    assert set().union(*(firsts(share) for share in shares)) == set(range(count))
    seen = [n for r in range(4) for n in firsts(data.batches("val", 8, rank=r, world=4))]
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_is_iterated_as_it_is_under_a_seeded_state(workers: int) -> None:
    data = Data.of(DataLoader(Squares(noisy=True), 6, shuffle=True, num_workers=workers))
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = list(data.batches("train", 99, epoch=1))
    mixed = []
    for batch in data.batches("train", 99, epoch=1):
        torch.rand(3), random.random()  # the caller's own randomness must not matter
        mixed.append(batch)
    assert len(first) == data.steps(99) == 4
    if workers == 0:  # Python's and numpy's state in workers are theirs to seed
        assert all(torch.equal(a[0], b[0]) for a, b in zip(first, mixed, strict=True))
    assert [b[1].tolist() for b in first] == [b[1].tolist() for b in mixed]
    other = list(data.batches("train", 99, epoch=2))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))
    assert np.array_equal(states[1], np.random.get_state()[1])


def test_loader_with_its_own_generator_is_reseeded() -> None:
    loader = DataLoader(Squares(), 6, shuffle=True, generator=torch.Generator())
    data = Data.of(loader)
    runs = [firsts(data.batches("train", 6, epoch=e)) for e in (1, 2, 1)]
    assert runs[0] == runs[2] != runs[1]
    rest = firsts(data.batches("train", 6, epoch=1, start=1))
    assert rest == runs[0][6:]


def test_loader_shared_between_ranks() -> None:
    data = Data(DataLoader(Squares(), 3), val=DataLoader(Squares(), 3))
    shares = [firsts(data.batches("train", 3, rank=r, world=2)) for r in range(2)]
    assert data.steps(3, world=2) == 3
    assert shares[0] == [0, 1, 2, 6, 7, 8, 12, 13, 14]
    assert shares[1][:3] == [3, 4, 5]
    own = DistributedSampler(Squares(), num_replicas=2, rank=1, shuffle=True)
    data = Data(DataLoader(Squares(), 5, sampler=own))
    assert data.steps(5, world=2) == 2
    runs = [firsts(data.batches("train", 5, epoch=e, rank=1, world=2)) for e in (0, 1)]
    assert [len(run) for run in runs] == [10, 10]
    assert runs[0] != runs[1]
    with pytest.raises(DataError, match="smaller or use fewer"):
        Data(DataLoader(Squares(), 20)).steps(20, world=2)


def test_batches_with_names_stay_as_they_are() -> None:
    data = Data.of(DataLoader(Named(), 4))
    batch = next(data.batches("train", 4))
    assert set(batch) == {"pixel_values", "labels"}
    inputs, labels = unpack(batch)
    assert set(inputs) == {"pixel_values"}
    assert labels.shape == (4,)
    assert set(data.example(2)) == {"pixel_values"}
    assert data.example(2)["pixel_values"].shape == (2, 2)
    assert data.sample(6)["pixel_values"].shape == (6, 2)
    data.check(2)
    with pytest.raises(DataError, match="must lie in 0..0"):
        data.check(1)


def test_unpack() -> None:
    assert unpack((1, 2, 3)) == ((1, 2), 3)
    assert unpack([1]) == ((1,), None)
    assert unpack(1) == ((1,), None)
    assert unpack({"a": 1}) == ({"a": 1}, None)


def test_missing_split_is_named() -> None:
    with pytest.raises(DataError, match="needs the split 'test'.*'train'"):
        Data(pair()).batches("test", 2)
    with pytest.raises(DataError, match="no length"):
        Data(DataLoader(Stream(), 2)).steps(2)


# ---------------------------------------------------------------- images


def test_images_are_normalised_as_they_are_taken() -> None:
    data = Data(images(), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    x, y = next(data.batches("train", 10))
    by_hand = (images()[0][:, 1].double() / 255 - 0.2) / 0.6
    torch.testing.assert_close(x[:, 1].double(), by_hand, atol=1e-6, rtol=1e-5)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    plain, _ = next(Data(images()).batches("train", 10))
    torch.testing.assert_close(plain, images()[0] / 255)
    floats = Data((images()[0].double().float() / 255, images()[1]), mean=data.mean, std=data.std)
    torch.testing.assert_close(next(floats.batches("train", 10))[0], x, atol=1e-5, rtol=1e-5)
    tokens = torch.randint(0, 9, (4, 7))
    assert torch.equal(next(Data((tokens, tokens[:, 0])).batches("train", 4))[0], tokens)


def test_crop_and_flip_by_hand() -> None:
    x = torch.arange(2 * 64, dtype=torch.uint8).view(2, 1, 8, 8)
    still = crop_flip(x, torch.tensor([[0.5, 0.5, 0.9], [0.5, 0.5, 0.1]]))
    assert torch.equal(still[0], x[0])
    assert torch.equal(still[1], x[1].flip(2))
    moved = crop_flip(x, torch.tensor([[0.0, 0.99, 0.9]]).expand(2, 3))
    assert torch.equal(moved[:, :, 1:, :7], x[:, :, :7, 1:])  # down by one, left by one
    assert not moved[:, :, 0].any()
    assert not moved[:, :, :, 7].any()


def test_augmentation_moves_every_image_differently() -> None:
    data = Data((images(1)[0].expand(64, -1, -1, -1), torch.zeros(64).long()), augment="crop-flip")
    x, _ = next(data.batches("train", 64, augment=True))
    assert len({image.sum().item() for image in x}) > 20
    still, _ = next(data.batches("train", 64))
    assert len({image.sum().item() for image in still}) == 1


# ---------------------------------------------------------------- sample, example, subset, check


def test_sample_mixes_sorted_data_of_every_kind() -> None:
    labels = torch.arange(400) // 100
    inputs = labels.float().view(-1, 1)
    for train in (
        (inputs, labels),
        TensorDataset(inputs, labels),
        DataLoader(TensorDataset(inputs, labels), 10),
    ):
        data = Data(train)
        drawn = data.sample(100)
        assert drawn.shape == (100, 1)
        assert min(torch.bincount(drawn.flatten().long(), minlength=4)) > 10
        assert torch.equal(drawn, data.sample(100))
        assert not torch.equal(drawn, data.sample(100, seed=1))
        assert len(data.sample(1000)) == 400
        assert torch.equal(data.example(2)[0], inputs[:2])


def test_sample_of_a_stream_takes_its_beginning() -> None:
    data = Data(DataLoader(Stream(), 4))
    assert data.sample(5).flatten().tolist() == [0, 3, 6, 9, 12]
    assert len(data.example()[0]) == 1
    with pytest.raises(DataError, match="it is empty"):
        Data([]).sample(3)


def test_sample_draws_only_what_the_sampler_draws() -> None:
    loader = DataLoader(Squares(), 4, sampler=torch.utils.data.SubsetRandomSampler([2, 5, 7]))
    assert sorted(Data(loader).sample(9)[:, 1].tolist()) == [2, 5, 7]


def test_subset() -> None:
    data = Data(pair(), Squares(), pair(9)).subset(train=5, val=3)
    assert (data.size(), data.size("val"), data.size("test")) == (5, 3, 9)
    assert torch.equal(data.train[0], Data(pair()).subset(train=8).train[0][:5])
    with pytest.raises(DataError, match="loader's own"):
        Data(DataLoader(Squares())).subset(train=3)
    with pytest.raises(DataError, match="at least 1"):
        data.subset(train=0)


def spoil(what: str) -> Data:
    x, y = pair()
    if what == "nan":
        x[7, 1] = float("nan")
    if what == "inf":
        x[7, 1] = float("inf")
    if what == "length":
        y = y[:-1]
    if what == "complex":
        y = y.to(torch.complex64)
    if what == "empty":
        x, y = x[:0], y[:0]
    if what == "range":
        y[3] = 4
    if what == "negative":
        y[3] = -1
    return Data((x, y), classes=4)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nan", "1 samples hold NaN or infinity, the first is number 7"),
        ("inf", "NaN or infinity"),
        ("length", "40 inputs and 39 labels"),
        ("complex", "real numbers"),
        ("empty", "at least one sample"),
        ("range", r"must lie in 0..3, one for each of the 4 outputs, but 4 came"),
        ("negative", "but -1 came"),
    ],
)
def test_check_says_what_is_wrong(what: str, message: str) -> None:
    spoil("nothing").check()
    with pytest.raises(DataError, match=message):
        spoil(what).check()
    with pytest.raises(DataError, match=message.replace("train", "val")):
        replace(spoil(what), train=pair(), val=spoil(what).train).check()
    if what not in ("range", "negative", "nan", "inf", "length"):
        with pytest.raises(DataError, match=message):
            Data.of(spoil(what).train)


def test_check_looks_at_the_first_batch_of_loaders() -> None:
    Data(DataLoader(Squares(), 4)).check(2)
    Data(Squares()).check(2)
    with pytest.raises(DataError, match="must lie in"):
        Data(DataLoader(Squares(), 4)).check(1)
    with pytest.raises(DataError, match="first batch is missing"):
        Data([]).check()
    with pytest.raises(DataError, match="model with more classes"):
        Data(pair(), classes=4).check(3)
    ignored = torch.tensor([0, -100, 1])
    Data((torch.zeros(3, 2), ignored)).check(2)


def test_wrong_fields() -> None:
    with pytest.raises(DataError, match="'none' or 'crop-flip'"):
        Data(augment="mixup")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="one number per channel"):
        Data(mean=(0.5,))


# ---------------------------------------------------------------- Train


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": -1},
        {"epochs": float("nan")},
        {"epochs": "ten"},
        {"finetune": float("inf")},
        {"batch": 0},
        {"batch": 1.5},
        {"lr": 0},
        {"optimizer": "adam"},
        {"momentum": 1.0},
        {"momentum": 0},
        {"weight_decay": -1e-4},
        {"schedule": "linear"},
        {"warmup": 1.1},
        {"clip": 0.0},
        {"distill": 2},
        {"temperature": 0},
        {"precision": "fp8"},
        {"device": "gpu"},
        {"devices": 0},
        {"devices": True},
        {"checkpoint_every": 0},
        {"nesterov": 1},
    ],
    ids=str,
)
def test_train_refuses(wrong: dict[str, Any]) -> None:
    name = next(iter(wrong))
    with pytest.raises(DataError, match=rf"Train\({name}=\.\.\.\) must be"):
        Train(**wrong)


def test_train_counts_steps() -> None:
    plan = Train(epochs=0.5, finetune=0, momentum=0, nesterov=False, device="cuda:1", clip=1)
    assert plan.steps(352) == 176
    assert plan.steps(352, finetune=True) == 0
    assert Train(epochs=0.001).steps(10) == 1
    assert Train(momentum=0, optimizer="adamw")


# ---------------------------------------------------------------- load


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(path: Path, value: int, *, size: int = 6, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size, size), value if mode == "L" else (value, 0, 0)).save(path)


def parquet(path: Path, count: int, *, size: int = 32) -> None:
    datasets = pytest.importorskip("datasets")
    shots = [Image.new("RGB", (size, size), (i, 10, 20)) for i in range(count)]
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "eel"])}
    )
    rows = {"img": shots, "label": [i % 3 for i in range(count)]}
    rows = datasets.Dataset.from_dict(rows, features=features)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(str(path))


def test_mnist5k(mnist5k: Data) -> None:
    mnist5k.check(10)
    sizes = [mnist5k.size(split) for split in ("train", "val", "test")]
    assert sizes == [4000, 500, 500]
    assert mnist5k.label_counts("train").tolist() == [400] * 10
    assert mnist5k.label_counts("test").tolist() == [50] * 10
    assert mnist5k.train[0].shape[1:] == (1, 28, 28)
    assert len(mnist5k.train[1][:50].unique()) == 10  # not sorted by class
    x = mnist5k.sample(2000)
    assert abs(x.mean()) < 0.05
    assert abs(x.std() - 1) < 0.05
    assert 0.1 < mnist5k.mean[0] < 0.15


def test_digits(digits: Data) -> None:
    digits.check(10)
    assert sum(digits.size(split) or 0 for split in ("train", "val", "test")) == 1797
    assert digits.example()[0].shape == (1, 1, 8, 8)
    assert digits.train[0].max() == 255
    assert torch.equal(load("digits", seed=5).test[0], digits.test[0])  # the test never moves


def test_parquet_folder(tmp_path: Path, own_cache: Path) -> None:
    parquet(tmp_path / "set" / "train-00000.parquet", 12)
    parquet(tmp_path / "set" / "train-00001.parquet", 8)
    parquet(tmp_path / "set" / "test.parquet", 4)
    data = load(str(tmp_path / "set"))
    data.check()
    assert [data.size(s) for s in ("train", "val", "test")] == [18, 2, 4]
    assert (data.classes, data.name, data.augment) == (("cat", "dog", "eel"), "set", "crop-flip")
    assert data.mean == (0.485, 0.456, 0.406)
    assert data.train[0][:3, :, 0, 0].tolist() == [[0, 10, 20], [1, 10, 20], [2, 10, 20]]
    assert data.val[1].tolist() == [0, 1]  # rows 6 and 7 of the second file
    assert data.val[0][:, 0, 0, 0].tolist() == [6, 7]


def test_parquet_with_validation_in_the_data_folder(tmp_path: Path, own_cache: Path) -> None:
    parquet(tmp_path / "data" / "train.parquet", 6, size=16)
    parquet(tmp_path / "data" / "validation.parquet", 3, size=16)
    data = load(str(tmp_path))
    assert (data.size(), data.size("val"), data.has("test")) == (6, 3, False)
    assert data.augment == "none"


def test_decoded_images_are_kept_until_the_file_changes(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "set" / "train.parquet"
    parquet(file, 12)
    first = load(str(file.parent))
    (kept,) = (own_cache / "pliant").glob("*.safetensors")
    from pliant.data import readers

    monkeypatch.setattr(readers, "_read_parquet", None)  # would fail if it were asked
    again = load(str(file.parent))
    assert torch.equal(first.train[0], again.train[0])
    assert again.classes == first.classes
    again.train[0][:] = 0  # in memory of its own, not in the file
    assert torch.equal(load(str(file.parent)).train[0], first.train[0])
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_cache))
    kept.write_bytes(b"broken")
    assert torch.equal(load(str(file.parent)).train[0], first.train[0])
    parquet(file, 20)
    assert load(str(file.parent)).size() == 18


def test_no_cache_folder_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    parquet(tmp_path / "set" / "train.parquet", 3)
    assert load(str(tmp_path / "set")).size() == 3


def test_parquet_that_is_none(tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="must be a parquet file"):
        load(str(tmp_path))
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a"], "label": [1]}).to_parquet(
        str(tmp_path / "train.parquet")
    )
    with pytest.raises(DataError, match="one column of images"):
        load(str(tmp_path))


def test_image_folder(tmp_path: Path) -> None:
    for i in range(20):
        png(tmp_path / "train" / ("cat" if i < 10 else "dog") / f"{i:02}.png", i)
    png(tmp_path / "test" / "dog" / "x.png", 99)
    data = load(str(tmp_path))
    data.check()
    assert (data.size(), data.size("val"), data.size("test")) == (18, 2, 1)
    assert data.classes == ("cat", "dog")
    assert data.test[1].tolist() == [1]
    for x, y in (data.train, data.val):
        assert torch.equal((x[:, 0, 0, 0] >= 10).long(), y)
    png(tmp_path / "val" / "eel" / "x.png", 1)
    with pytest.raises(DataError, match="has 'eel'"):
        load(str(tmp_path))


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    for i in range(4):
        png(tmp_path / "train" / "a" / f"{i}.png", 60 * i, mode="L")
    data = load(str(tmp_path))
    assert data.train[0].shape == (4, 1, 6, 6)
    assert len(data.mean) == 1


def test_images_that_cannot_be_used(tmp_path: Path) -> None:
    png(tmp_path / "train" / "a" / "0.png", 0)
    png(tmp_path / "train" / "a" / "1.png", 0, size=7)
    with pytest.raises(DataError, match=r"one size.*1\.png"):
        load(str(tmp_path))
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png must be an image"):
        load(str(tmp_path))
    for name in ("0.png", "1.png"):
        (tmp_path / "train" / "a" / name).unlink()
    with pytest.raises(DataError, match="there are none"):
        load(str(tmp_path))


def test_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "import torch\ndef make():\n    return torch.zeros(20, 2), torch.arange(20) % 2\nn = 3\n"
        "def boom():\n    raise OSError('no disk')\n"
    )
    (tmp_path / "my_own_data.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert load("my_own_data:make").size() == 18
    assert sys.path == path
    for spec, message in (
        ("my_own_data:n", "not a int"),
        ("my_own_data:made", "no attribute 'made'"),
        ("not_there:make", "No module named"),
        ("my_own_data:boom", "raises OSError: no disk; call it in Python"),
    ):
        with pytest.raises(DataError, match=message):
            load(spec)


def test_unknown_data_lists_what_is_possible(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"parquet.*module:callable.*did you mean mnist5k"):
        load("mnist")
    with pytest.raises(DataError, match="check the path"):
        load("/no/such/folder")
    with pytest.raises(DataError, match="but holds nothing"):
        load(str(tmp_path))


@pytest.mark.data
@pytest.mark.slow  # decodes 50,000 JPEGs the first time
def test_cifar_is_decoded_once_and_then_lies_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from pliant.data import readers

    load(str(needs_data("cifar10-jpeg")))
    monkeypatch.setattr(readers, "decode", None)  # would fail if it were asked
    data = load(str(needs_data("cifar10-jpeg")))
    assert [data.size(s) for s in ("train", "val", "test")] == [45000, 5000, 5000]
    for pixels, labels in (data.train, data.val, data.test):
        assert isinstance(pixels, Tensor) and pixels.dtype == torch.uint8
        assert isinstance(labels, Tensor)
    batch, _ = next(data.batches("train", 128, augment=True, shuffle=True))
    assert batch.shape == (128, 3, 32, 32) and batch.dtype == torch.float32
