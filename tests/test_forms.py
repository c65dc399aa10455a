"""Data in the forms that people hold them in: what is read right, and what is refused in words."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pliant
from pliant import Data, Train
from pliant.cost import tensors
from pliant.data import unpack
from pliant.data.asking import in_memory
from pliant.data.classes import binary_hits, binary_loss
from pliant.data.digest import digests
from pliant.data.readers import load
from pliant.data.ready import multi_label, task_of
from pliant.data.sources import Batches, Columns, Items
from pliant.data.together import as_tensor
from pliant.drivers.loop import evaluate
from pliant.errors import DataError, MethodError, ModelError, TrainingError


class Pooled(nn.Module):
    """A score for each of 4 classes from a sequence, with a batch axis or without."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu().mean(-2))


class Recurrent(nn.Module):
    """The same from a recurrent layer, which can do without a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.last = nn.LSTM(16, 8, batch_first=True), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rows(x)[0])


def rows(count: int = 32) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 16), torch.arange(count) % 4


@pytest.mark.parametrize("label", [3, torch.tensor(3), np.int64(3), np.array(3)])
def test_an_item_with_one_label_is_a_sample(label: object) -> None:
    data = Data.of([(torch.randn(10, 16), label)] * 20).read_by(Pooled())
    assert isinstance(data.source("train"), Items)
    assert next(tensors(data.example())).shape == (1, 10, 16)


@pytest.mark.parametrize("network", [Pooled(), Recurrent()])
def test_a_sequence_without_a_label_is_a_sample_where_it_has_one_answer(network: nn.Module) -> None:
    data = Data.of([torch.randn(10, 16)] * 20).read_by(network)
    assert isinstance(data.source("train"), Items)


def test_rows_with_an_answer_each_stay_a_batch() -> None:
    data = Data.of([torch.randn(10, 16)] * 20).read_by(nn.Linear(16, 4))
    assert isinstance(data.source("train"), Batches)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12.0).reshape(4, 3)[::-1],
        np.arange(12.0).reshape(4, 3).astype(">f4"),
        pytest.importorskip("pandas").DataFrame(np.arange(12.0).reshape(4, 3)),
    ],
)
def test_arrays_of_any_order_are_read(array: np.ndarray) -> None:
    found = as_tensor(array)
    assert found.dtype == torch.float32
    assert found.tolist() == np.asarray(array).tolist()


def test_arrays_of_text_and_sparse_tensors_are_refused() -> None:
    with pytest.raises(DataError, match="Arrays must hold numbers"):
        as_tensor(np.array(["a", "b"]))
    with pytest.raises(DataError, match="to_dense"):
        Data.of(torch.eye(4).to_sparse())


@dataclass
class Sample:
    image: Tensor
    meta: Tensor
    label: Tensor | int


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 4), nn.Linear(8, 4)

    def forward(self, image: Tensor, meta: Tensor) -> Tensor:
        return self.a(image) + self.b(meta)


class Whole(Both):
    def forward(self, sample: Sample) -> Tensor:  # type: ignore[override]
        return super().forward(sample.image, sample.meta)


@pytest.mark.parametrize("network", [Both(), Whole()])
def test_dataclasses_go_by_name_or_whole(network: nn.Module) -> None:
    samples = [Sample(torch.randn(16), torch.randn(8), n % 4) for n in range(20)]
    result = pliant.compress(network, samples, "hac")
    assert result.report.task.startswith("classification")
    assert unpack(samples[3])[1] == 3


def test_labels_in_a_mapping_or_tuple_belong_to_inputs() -> None:
    x, y = rows()
    for labels in ({"kind": y, "box": x}, (y, x)):
        source = in_memory((x, labels))
        assert isinstance(source, Columns)
        found = unpack(source.batch(torch.arange(3)))[1]
        assert len(found) == 2
    assert in_memory(((x, y), (x, y))) is None  # two batches
    assert in_memory(({"a": x}, {"a": x})) is None


def test_a_stream_says_how_to_give_it_a_length() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[tuple[Tensor, int]]:
            return ((x, n % 4) for n, x in enumerate(rows(40)[0]))

    class Long(Stream):
        def __len__(self) -> int:
            return 40

    network = nn.Linear(16, 4)
    assert Data.of(Long()).read_by(network).steps(8) == 2  # batches of 32
    with pytest.raises(DataError, match=r"give list\(batches\)"):
        Data.of(Stream()).read_by(network).steps(8)


def test_a_sample_that_cannot_be_read_is_named() -> None:
    class Broken(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            if index == 17:
                raise OSError("disk")
            return super().__getitem__(index)

    with pytest.raises(DataError, match="Sample 17 cannot be read.*OSError: disk"):
        Data.of(Broken(*rows())).read_by(nn.Linear(16, 4))


def test_batches_without_samples_are_left_out() -> None:
    x, y = rows()
    given = [(x[:0], y[:0]), (x[:16], y[:16]), (x[:0], y[:0]), (x[16:], y[16:])]
    data = Data(train=given)
    assert data.steps(8) == 2
    assert [len(batch[0]) for batch in data.batches("train", 8)] == [16, 16]
    train = Train(epochs=1, batch=16)
    assert pliant.compress(nn.Linear(16, 4), given, "norm_loss", train=train).report.met


def test_what_needs_gradients_is_cut_off() -> None:
    x, y = rows()
    x.requires_grad_()
    train = Train(epochs=1, batch=16)
    for given in ((x * 2, y), [(x[:16], y[:16]), (x[16:], y[16:])]):
        pliant.compress(nn.Linear(16, 4), given, "norm_loss", train=train)
    assert x.grad is None


# ---------------------------------------------------------------- tasks


def test_a_value_may_stand_for_no_label() -> None:
    scores = torch.tensor([[2.0, -1.0, 3.0]])
    wanted = F.binary_cross_entropy_with_logits(scores[:, :2], torch.tensor([[1.0, 1.0]]))
    for void, missing in ((None, float("nan")), (-1, -1.0)):
        labels = torch.tensor([[1.0, 1.0, missing]])
        assert torch.isclose(binary_loss(scores, (None, labels), void=void), wanted)
        assert binary_hits(scores, (None, labels), void=void).tolist() == [True, False]
    assert str(multi_label(void=-1)) == "multi-label(void=-1)"
    with pytest.raises(DataError, match=r"task='multi-label\(void=-1\)'"):
        binary_loss(scores, (None, torch.tensor([[1, 0, -1]])))


def test_a_criterion_of_labels_is_refused_with_what_to_write() -> None:
    train = Train(epochs=1, batch=16)
    loss = nn.CrossEntropyLoss()
    with pytest.raises(MethodError, match=r"lambda output, batch: criterion\(output, batch\[1\]\)"):
        pliant.compress(nn.Linear(16, 4), rows(), "norm_loss", train=train, loss=loss)


def test_functions_of_ones_own_get_copies() -> None:
    def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        batch[1][batch[1] == 3] = -100
        return F.cross_entropy(output, batch[1])

    def clamped(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return output.zero_().mean()

    task = task_of("classification", loss, {"clamped": (clamped, "lower")})
    assert task is not None and task.loss is not None
    output, (x, y) = torch.randn(32, 4), rows()
    task.loss(output, (x, y))
    before = output.clone()
    with torch.no_grad():
        assert float(task.metrics["clamped"].of(output, (x, y))) == 0
    assert torch.equal(y, rows()[1]) and torch.equal(output, before)


def test_a_second_output_in_training_is_refused_before_any_work() -> None:
    class Auxiliary(Both):
        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
            return (self.a(x), self.a(x)) if self.training else self.a(x)

    seen: list[object] = []
    with pytest.raises(ModelError, match="the network gives 2"):
        pliant.compress(Auxiliary(), rows(), "norm_loss", train=Train(epochs=1), watch=seen.append)
    assert seen == [{"phase": "prepare"}]


def test_a_last_batch_of_one_sample_trains_with_batch_norms() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))

    split = TensorDataset(*rows(17))
    for data in (Data(train=split), Data(train=DataLoader(split, 8))):
        result = pliant.compress(network(), data, "norm_loss", train=Train(epochs=1, batch=8))
        assert result.model[1].num_batches_tracked == 2  # type: ignore[index]
    with pytest.raises(ModelError, match="train on batches of two samples or more"):
        pliant.compress(network(), split, "norm_loss", train=Train(epochs=1, batch=1))


def test_a_loss_that_is_no_number_at_once_blames_no_learning_rate() -> None:
    def loss(output: Tensor, batch: object) -> Tensor:
        return output.sum() * float("nan")

    train = Train(epochs=1, batch=16)
    with pytest.raises(TrainingError, match="nothing was trained yet"):
        pliant.compress(nn.Linear(16, 4), rows(), "norm_loss", train=train, loss=loss)


# ---------------------------------------------------------------- images


def _image(path: Path, pixels: np.ndarray, **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **more)


def test_images_as_cameras_write_them(tmp_path: Path) -> None:
    half = np.zeros((24, 16, 3), np.uint8)
    half[:12] = 255
    aside = Image.Exif()
    aside[0x0112] = 6  # turn it clockwise
    for name in ("a", "b"):
        _image(tmp_path / name / "0.png", half)
        _image(tmp_path / name / "1.png", np.rot90(half).copy(), exif=aside.tobytes())
    Image.fromarray(half).save(
        tmp_path / "a" / "2.jpg", "MPO", save_all=True, append_images=[Image.fromarray(half)]
    )
    images = load(str(tmp_path)).train[0].float()
    assert images.shape[1:] == (3, 24, 16)
    assert images[:, :, :10].mean() > 250 and images[:, :, 14:].mean() < 5


def test_a_palette_of_greys_is_grey(tmp_path: Path) -> None:
    for name in ("a", "b"):
        grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("P")
        (tmp_path / name).mkdir()
        grey.save(tmp_path / name / "0.png")
    assert load(str(tmp_path)).train[0].shape == (2, 1, 8, 8)


def test_folders_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "test"):
        _image(tmp_path / name / "0.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(DataError, match="lie in no folder of a class, while those of train do"):
        load(str(tmp_path))
    (tmp_path / "train" / "a" / "again").symlink_to(tmp_path / "train" / "a")
    with pytest.raises(DataError, match="again is a link to a folder that holds it"):
        load(str(tmp_path))


# ---------------------------------------------------------------- decoders


def _translator() -> tuple[nn.Module, Tensor, Tensor]:
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 16}
    torch.manual_seed(0)
    network = transformers.BartForConditionalGeneration(
        transformers.BartConfig(vocab_size=40, **sizes)
    ).eval()
    read, said = torch.randint(3, 40, (20, 6)), torch.randint(3, 40, (20, 8))
    said[:, 6:] = -100
    return network, read, said


def test_a_decoder_reads_labels_moved_by_one() -> None:
    network, read, said = _translator()
    whole = {"input_ids": read, "labels": said}
    batches = [{name: part[i : i + 10] for name, part in whole.items()} for i in (0, 10)]
    samples = [{name: part[i] for name, part in whole.items()} for i in range(20)]
    lists = [{name: part.tolist() for name, part in sample.items()} for sample in samples]
    moved = network.prepare_decoder_input_ids_from_labels(said)  # type: ignore[operator]
    for given in (whole, batches, iter(batches), samples, lists, DataLoader(samples, 10)):
        data = Data(train=given) if given is not whole else Data(train=whole)
        first = next(data.read_by(network).batches("train", 10))
        assert torch.equal(first["decoder_input_ids"], moved[:10])
    assert Data(train=read).read_by(network).source("train").labels is None


def test_an_encoder_decoder_is_scored_as_it_scores_itself() -> None:
    network, read, said = _translator()
    with torch.no_grad():
        wanted = float(network(input_ids=read, labels=said).loss)
    data = Data(test={"input_ids": read, "labels": said}).read_by(network)
    assert evaluate(network, data, "test").loss == pytest.approx(wanted, rel=1e-5)


def test_labels_of_other_names_serve_a_network_that_returns_its_loss() -> None:
    class Answers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(16, 1)

        def forward(self, x: Tensor, start: Tensor | None = None) -> dict[str, Tensor]:
            logits = self.score(x)[..., 0]
            return {"logits": logits} | (
                {} if start is None else {"loss": F.cross_entropy(logits, start)}
            )

    data = {"x": torch.randn(20, 6, 16), "start": torch.arange(20) % 6}
    report = pliant.compress(Answers(), data, "norm_loss", train=Train(epochs=1)).report
    assert report.task == "own"


# ---------------------------------------------------------------- training


def test_a_second_look_at_lists_and_data_sets_sees_all_labels() -> None:
    x, y = rows(64)
    other = y.clone()
    other[61] = 3 - other[61]

    def digest(given: Any) -> str:
        return digests(Data(train=given))[1]

    def batches(labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        return list(zip(x.split(8), labels.split(8), strict=True))

    for make in (batches, lambda labels: DataLoader(TensorDataset(x, labels), 8)):
        assert digest(make(y)) == digest(make(y)) != digest(make(other))


def test_another_loss_is_another_training(tmp_path: Path) -> None:
    def run(loss: Any, *, resume: bool) -> object:
        train = Train(epochs=1, batch=16)
        more: Any = {"train": train, "folder": tmp_path, "resume": resume, "loss": loss}
        return pliant.compress(nn.Linear(16, 4), rows(), "norm_loss", **more)

    torch.manual_seed(0)
    run(lambda output, batch: F.cross_entropy(output, batch[1]), resume=False)
    torch.manual_seed(0)
    with pytest.raises(TrainingError, match="its loss is"):
        run(lambda output, batch: F.cross_entropy(output, batch[1]) * 2, resume=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_mode_does_not_stop_a_training(mode: Any) -> None:
    with mode():
        result = pliant.compress(nn.Linear(16, 4), rows(), "norm_loss", train=Train(epochs=1))
    assert result.report.history


def test_lbfgs_starts_afresh_behind_an_edit() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    x, y = rows()
    optimizer = torch.optim.LBFGS(network.parameters(), 0.1, max_iter=2)
    budget, data = pliant.Budget(params=0.7), Data(train=(x, y))
    method = pliant.method("nrmf(search=0.3)")
    run = pliant.start(network, method, budget, data=data, optimizer=optimizer, steps=6)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), y)
        loss.backward()
        return loss

    for _ in range(6):
        closure()
        run.before_step()
        optimizer.step(closure)  # type: ignore[arg-type]
        run.after_step()
    run.finish()
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert run.edits and held == {id(p) for p in network.parameters()}
