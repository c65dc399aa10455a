"""Data as people have it: without labels, by name, nested, in lists, from generators."""

import collections
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import pliant
from pliant.cost import call, fitted
from pliant.data import Data, unpack
from pliant.data.together import together
from pliant.errors import DataError, ModelError

NOISE = torch.Generator().manual_seed(0)
A, B = torch.randn(40, 6, generator=NOISE), torch.randn(40, 5, generator=NOISE)
Y = torch.arange(40) % 4
PICTURES = torch.randn(40, 3, 8, 8, generator=NOISE)
HALVES = (slice(0, 20), slice(20, 40))
UNEVEN = [torch.randn(3, 8, 8 + i % 3, generator=NOISE) for i in range(20)]
Inputs = collections.namedtuple("Inputs", "image meta")
Labelled = collections.namedtuple("Labelled", "image meta label")


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 16), nn.Linear(5, 16), nn.Linear(32, 4)

    def forward(self, image: Tensor, meta: Tensor) -> Tensor:
        out: Tensor = self.out(torch.cat([self.a(image).relu(), self.b(meta).relu()], -1))
        return out


class OneMapping(Two):
    def forward(self, batch: Any) -> Tensor:  # type: ignore[override]
        return super().forward(batch["image"], batch["meta"])


class OnePair(Two):
    def forward(self, pair: Any) -> Tensor:  # type: ignore[override]
        return super().forward(*pair)


class Detector(nn.Module):
    """Takes a list of images of any size, as torchvision's do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))

    def forward(self, images: Any, targets: Any = None) -> Any:
        assert isinstance(images, list | tuple), "a list of images, please"
        return [{"boxes": self.body(image[None])[0].flatten(1).t()} for image in images]


def convolutions(*, pooled: bool = True) -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    if pooled:
        net.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)])
    return net


class Made(Dataset):
    def __init__(self, make: Callable[[int], Any], count: int = 40) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Any:
        return self.make(row)


class Stream(IterableDataset):
    def __init__(self, make: Callable[[int], Any], count: int = 40) -> None:
        self.make, self.count = make, count

    def __iter__(self) -> Iterator[Any]:
        return map(self.make, range(self.count))


def named(rows: Any) -> dict[str, Tensor]:
    return {"image": A[rows], "meta": B[rows]}


def beside(row: int) -> Any:
    return named(row), row % 4


def both(row: int) -> Any:
    return Inputs(A[row], B[row])


def nested(row: int) -> Any:
    return (A[row], B[row]), row % 4


def hugging() -> Any:
    datasets = pytest.importorskip("datasets")
    columns = {"image": A.tolist(), "meta": B.tolist(), "label": Y.tolist(), "text": ["x"] * 40}
    return datasets.Dataset.from_dict(columns)


def encoding() -> Any:
    return pytest.importorskip("transformers").BatchEncoding(named(slice(None)))


def pairs(batch: list[Any]) -> Any:
    return tuple(zip(*batch, strict=True))


def boxes(row: int) -> Any:
    return UNEVEN[row], {"boxes": torch.ones(row % 3, 4)}


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "two": Two, "mapping": OneMapping, "pair": OnePair, "images": convolutions,
    "maps": lambda: convolutions(pooled=False), "list": Detector,
}  # fmt: skip

# What came, the network that reads it, and whether it has labels.
GIVEN: dict[str, tuple[str, Callable[[], Any], bool]] = {
    "tensor": ("images", lambda: PICTURES, False),
    "array": ("images", lambda: PICTURES.numpy(), False),
    "tuple of one": ("images", lambda: (PICTURES,), False),
    "list of batches": ("images", lambda: list(PICTURES.split(8)), False),
    "list of samples": ("images", lambda: list(PICTURES), False),
    "list of (image, label)": ("images", lambda: [(PICTURES[i], i % 4) for i in range(40)], True),
    "list of labelled batches": ("images", lambda: [(PICTURES[i], Y[i]) for i in HALVES], True),
    "list of maps": ("maps", lambda: list(PICTURES), False),
    "list of batches of maps": ("maps", lambda: list(PICTURES.split(8)), False),
    "data set": ("images", lambda: Made(PICTURES.__getitem__), False),
    "data set of tuples of one": ("images", lambda: TensorDataset(PICTURES), False),
    "loader": ("images", lambda: DataLoader(PICTURES, 8), False),
    "stream of samples": ("images", lambda: Stream(PICTURES.__getitem__), False),
    "stream of labelled samples": ("images", lambda: Stream(lambda i: (PICTURES[i], i % 4)), True),
    "loader of a stream": ("images", lambda: DataLoader(Stream(PICTURES.__getitem__), 8), False),
    "generator of batches": ("images", lambda: (x for x in PICTURES.split(8)), False),
    "generator of samples": ("images", lambda: (x for x in PICTURES), False),
    "mapping": ("two", lambda: named(slice(None)), False),
    "mapping of arrays": ("two", lambda: {"image": A.numpy(), "meta": B.tolist()}, False),
    "mapping with labels": ("two", lambda: {**named(slice(None)), "labels": Y}, True),
    "encoding": ("two", encoding, False),
    "list of encodings": ("two", lambda: [encoding()], False),
    "list of mappings": ("two", lambda: [named(i) for i in range(40)], False),
    "list of batches by name": ("two", lambda: [named(i) for i in HALVES], False),
    "data set of mappings": ("two", lambda: Made(named), False),
    "generator of mappings": ("two", lambda: (named(i) for i in range(40)), False),
    "(mapping, label)": ("two", lambda: Made(beside), True),
    "loader of (mapping, label)": ("two", lambda: DataLoader(Made(beside)), True),
    "(mapping, labels)": ("two", lambda: (named(slice(None)), Y), True),
    "one mapping": ("mapping", lambda: named(slice(None)), False),
    "one (mapping, label)": ("mapping", lambda: Made(beside), True),
    "named tuple": ("two", lambda: Inputs(A, B), False),
    "data set of named tuples": ("two", lambda: Made(both), False),
    "labelled named tuples": ("two", lambda: Made(lambda i: Labelled(A[i], B[i], i % 4)), True),
    "loader of named tuples": ("two", lambda: DataLoader(Made(both), 8), False),
    "((a, b),)": ("two", lambda: ((A, B),), False),
    "((a, b), labels)": ("two", lambda: ((A, B), Y), True),
    "(a, b, labels)": ("two", lambda: (A, B, Y), True),
    "one pair": ("pair", lambda: ((A, B), Y), True),
    "nested items": ("two", lambda: Made(nested), True),
    "loader of nested items": ("two", lambda: DataLoader(Made(nested), 8), True),
    "hugging face": ("two", hugging, True),
    "hugging face as tensors": ("two", lambda: hugging().with_format("torch"), True),
    "list of sizes": ("list", lambda: UNEVEN, False),
    "data set of sizes": ("list", lambda: Made(boxes, 20), False),
    "list of lists": ("list", lambda: [(UNEVEN[:10], [{}] * 10), (UNEVEN[10:], [{}] * 10)], False),
    "loader of lists": ("list", lambda: DataLoader(Made(boxes, 20), 4, collate_fn=pairs), False),
    "two lists": ("list", lambda: (UNEVEN, [{}] * 20), False),
    "one by one": ("maps", lambda: UNEVEN, False),
}  # fmt: skip


def seen(model: nn.Module, data: Data) -> tuple[list[float], list[int]]:
    """A number for every sample that the network was shown, and the labels beside them."""
    numbers: list[float] = []
    labels: list[int] = []
    for split in ("train", "val"):
        for batch in data.batches(split, 8) if data.has(split) else ():  # type: ignore[arg-type]
            inputs, beside = unpack(batch)
            with torch.no_grad():
                out = call(model, inputs)
            rows = [each["boxes"] for each in out] if isinstance(out, list) else out
            numbers += [float(row.double().sum()) for row in rows]
            labels += beside.tolist() if isinstance(beside, Tensor) else []
    return numbers, labels


def wanted(kind: str, model: nn.Module, given: str) -> list[float]:
    if kind == "list" or given == "one by one":
        one = model.body if isinstance(model, Detector) else model
        rows = [one(image[None])[0] for image in UNEVEN]
    elif kind in ("images", "maps"):
        rows = list(model(PICTURES))
    else:
        rows = list(Two.forward(model, A, B))  # type: ignore[arg-type]
    return [float(row.double().sum()) for row in rows]


@pytest.mark.parametrize("given", GIVEN)
def test_every_sample_reaches_the_network_as_it_takes_it(given: str) -> None:
    kind, make, labelled = GIVEN[given]
    torch.manual_seed(0)
    model = NETWORKS[kind]()
    data = Data.of(make()).read_by(model)
    example = data.example_for(model)
    call(model, example)
    with torch.no_grad():
        expected = wanted(kind, model, given)
    numbers, labels = seen(model, data)
    assert sorted(numbers) == pytest.approx(sorted(expected), abs=1e-4)
    if labelled:  # each beside the sample that it belongs to
        near = torch.tensor(numbers)[:, None] - torch.tensor(expected)
        assert labels == (near.abs().argmin(1) % 4).tolist()
        assert sorted(labels) == sorted(Y.tolist())
    else:
        assert not labels
    again, _ = seen(model, data)
    assert again == pytest.approx(numbers)  # a second look sees the same


@pytest.mark.parametrize(
    "given",
    ["tensor", "generator of batches", "(mapping, label)", "list of sizes", "loader of lists",
     "hugging face", "one by one"],
)  # fmt: skip
@pytest.mark.parametrize("spec", ["nrmf(samples=16)", "groupwise_ptq(independent=2, joint=2)"])
def test_calibration_needs_no_labels(given: str, spec: str) -> None:
    kind, make, _ = GIVEN[given]
    model = NETWORKS[kind]()
    budget = "params=0.9" if "nrmf" in spec else None
    result = pliant.compress(model, make(), spec, budget, strict=False)
    assert result.edits


def test_splits_by_name() -> None:
    parts = {"train": Made(named), "validation": Made(named, 7), "test": Made(named, 3)}
    data = Data.of(parts)
    assert [data.size(split) for split in ("train", "val", "test")] == [40, 7, 3]


def test_where_a_pair_could_be_two_inputs_it_is_said_how_to_write_that() -> None:
    with pytest.raises(DataError, match=r"40 inputs and 39 labels.*\(\(a, b\),\) or by name"):
        Data.of((A, B[:39]))


def test_a_generator_is_read_once_and_kept() -> None:
    asked: list[int] = []

    def batches() -> Iterator[Tensor]:
        for number, batch in enumerate(PICTURES.split(8)):
            asked.append(number)
            yield batch

    net = convolutions()
    pliant.compress(net, batches(), "nrmf(samples=16)", "params=0.9")
    assert asked == list(range(len(asked)))


def test_what_can_be_gone_through_once_is_kept_too() -> None:
    class Once:
        def __init__(self) -> None:
            self.batches = iter(PICTURES.split(8))

        def __iter__(self) -> Iterator[Tensor]:
            return self.batches

    class OnceSet(IterableDataset):
        def __init__(self) -> None:
            self.rows = iter(PICTURES)

        def __iter__(self) -> Iterator[Tensor]:
            return self.rows

    for given in (Once(), DataLoader(OnceSet(), 8), OnceSet(), zip(PICTURES.split(8))):
        data = Data.of(given).read_by(convolutions())
        first = [unpack(batch)[0][0] for batch in data.batches("train", 8)]
        second = [unpack(batch)[0][0] for batch in data.batches("train", 8)]
        assert torch.equal(torch.cat(first), PICTURES)
        assert torch.equal(torch.cat(second), PICTURES)


def test_several_inputs_by_example_and_by_signature() -> None:
    class Optional(nn.Module):
        def forward(self, x: Any, mask: Any = None, **options: Any) -> Any:
            return x

    assert fitted(Two(), ((A, B),)) == (A, B)
    assert fitted(Two(), ({"image": A, "meta": B},)) == {"image": A, "meta": B}
    assert fitted(Two(), {"image": A, "meta": B, "text": ["a"]}).keys() == {"image", "meta"}
    assert fitted(OneMapping(), {"image": A, "meta": B}) == ({"image": A, "meta": B},)
    images = [A, A]
    assert fitted(Detector(), (images,))[0] is images  # type: ignore[index]
    assert fitted(Optional(), {"x": A, "ids": B, "text": ["a"]}).keys() == {"x", "ids"}
    net = nn.Sequential(nn.Linear(6, 4))
    assert fitted(net, (A,)) == (A,)


def test_inputs_are_never_changed() -> None:
    @dataclass
    class Graph:
        x: Tensor

        def to(self, device: Any) -> "Graph":
            return self

    class Spoils(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, one: Any) -> Tensor:
            found = one if isinstance(one, Tensor) else one.x if hasattr(one, "x") else one["x"]
            return self.layer(found.sub_(5).div_(9))  # type: ignore[no-any-return]

    class Object:
        def __init__(self, x: Tensor) -> None:
            self.x = x

        def to(self, device: Any) -> "Object":
            return self

    class Nested(Spoils):
        def forward(self, one: Any) -> Tensor:
            return super().forward(one["inner"][0] if isinstance(one["inner"], list) else one)

    for make in (lambda x: x, Graph, Object, lambda x: {"x": x}):
        x = A.clone()
        net = Spoils() if not isinstance(make(x), dict) else Spoils()
        first = call(net, (make(x),))
        assert torch.equal(x, A)
        assert torch.equal(call(net, (make(x),)), first)
    x = A.clone()
    call(Nested(), ({"inner": [x]},))
    assert torch.equal(x, A)
    run = pliant.start(Spoils(), pliant.method("energy"), pliant.Budget(params=0.9), example=(x,))
    run.finish(strict=False)
    pliant.cost(Spoils(), (x,))
    assert torch.equal(x, A)
    data = Data.of(A.clone())
    pliant.compress(Spoils(), data, "energy(samples=16)", "params=0.9", strict=False)
    assert sorted(torch.cat([data.train, data.val])[:, 0].tolist()) == sorted(A[:, 0].tolist())


def test_packed_sequences_stay_what_they_are() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.head = nn.LSTM(5, 32, batch_first=True), nn.Linear(32, 32)

        def forward(self, packed: PackedSequence) -> Tensor:
            assert isinstance(packed, PackedSequence)
            return self.head(self.rows(packed)[1][0][-1])  # type: ignore[no-any-return]

    packed = pack_sequence([torch.randn(4, 5), torch.randn(2, 5)])
    result = pliant.compress(Packed(), [packed] * 3, "energy(samples=4)", "params=0.95",
                             example=packed, strict=False)  # fmt: skip
    assert result.report.inputs["one sample"] == "1 of 2 packed sequences"


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([torch.zeros(3), torch.zeros(4)], r"\(3,\) and \(4,\).*collate_fn"),
        ([[1, 2], [1, 2, 3]], r"\[2, 3\] numbers.*padding=True"),
        ([{"a": 1}, {"b": 1}], "same names.*'a'"),
        ([(1, 2), (1, 2, 3)], "equally many things"),
        ([torch.zeros(3), "text"], "of one kind"),
    ],
)
def test_samples_that_make_no_batch(items: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        together(items)


def test_samples_put_together() -> None:
    pil = pytest.importorskip("PIL.Image")
    items = [{"x": np.ones(2), "n": 1, "f": 0.5, "t": "a", "p": (1, [2.0, 3.0]), "o": None}] * 2
    batch = together(items)
    assert (batch["x"].dtype, batch["n"].dtype, batch["f"].dtype) == (
        torch.float32,
        torch.int64,
        torch.float32,
    )
    assert (batch["t"], batch["o"]) == (["a", "a"], [None, None])
    assert batch["p"][1].tolist() == [[2.0, 3.0], [2.0, 3.0]]
    with pytest.raises(DataError, match="ToTensor"):
        together([pil.new("RGB", (2, 2))])


def test_what_no_reading_fits_is_refused_before_any_work() -> None:
    with pytest.raises((ModelError, DataError)):
        pliant.compress(convolutions(), [torch.zeros(7)] * 4, "nrmf", "params=0.9")


def test_two_inputs_taken_for_inputs_and_labels_are_refused_with_how_to_write_them() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(5, 8)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.a(a) + self.b(b)

    a, b = torch.randn(20, 6), torch.randn(20, 5)
    for given in ([a, b], (a, b)):
        with pytest.raises(ModelError, match=r"write two inputs of one call as \(\(a, b\),\)"):
            pliant.compress(Both(), given, "energy", "params=0.9")
    with pytest.raises(ModelError, match="or by name"):
        pliant.cost(Both(), (a,))
    assert pliant.compress(Both(), ((a, b),), "energy", "params=0.9").report.met


@pytest.mark.parametrize(
    "given", [(A, None), [(row, None) for row in A], [(rows, None) for rows in A.split(20)]]
)
def test_none_in_the_place_of_labels_stands_for_none(given: Any) -> None:
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    assert pliant.compress(net, given, "nrmf(samples=20)", "params=0.9").report.met
    assert pliant.compress(Two(), ((A, B), None), "nrmf(samples=20)", "params=0.9").report.met


def test_text_is_no_label_of_a_ready_task() -> None:
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    texts = ["cat"] * len(A)
    for given in ((A, texts), list(zip(A, texts, strict=True))):
        with pytest.raises(DataError, match="number the classes, or name task='none'"):
            pliant.compress(net, given, "nrmf(samples=20)", "params=0.9")
        assert pliant.compress(net, given, "energy", "params=0.9", task="none").report.met


@pytest.mark.parametrize("method", ["nrmf", "group_fisher", "groupwise_ptq(joint=0)"])
def test_a_batch_that_the_network_cannot_read_is_refused_wherever_it_comes(method: str) -> None:
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    batches = [A[:8], A[8:16], torch.randn(8, 5)]
    with pytest.raises(ModelError, match=r"inputs of shape \(8, 5\).*check that model and data"):
        pliant.compress(net, batches, method, "bytes=0.9")


def test_three_things_of_which_one_is_no_input_are_refused_with_what_to_leave_out() -> None:
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(ModelError, match="leave out what is neither"):
        pliant.compress(net, (A, Y, torch.arange(40)), "energy", "params=0.9")
