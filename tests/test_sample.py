"""What one sample is, asked of the network: batch first, time first, lists, clips, graphs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader

import pliant
from pliant.cost import Samples, cost, counted, one_sample, samples_of, tensors
from pliant.data import Data
from pliant.surgery.passes import first_sample

ONE_STEP = 4 * 16 * (8 + 16)  # multiply-accumulates of an LSTM of 16 units that reads 8 numbers


class Recurrent(nn.Module):
    def __init__(self, *, both: bool = False, every: bool = False, first: bool = False) -> None:
        super().__init__()
        self.rows = nn.LSTM(8, 16, bidirectional=both, batch_first=first)
        self.head, self.every, self.first = nn.Linear(32 if both else 16, 4), every, first

    def forward(self, x: Tensor) -> Tensor:
        y = self.rows(x)[0]
        last = y if self.every else y[:, -1] if self.first else y[-1]
        return self.head(last)  # type: ignore[no-any-return]


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        def spread(x: Tensor) -> Tensor:
            return x.index_add(0, edges[1], x[edges[0]])

        return self.head(self.b(spread(self.a(spread(x)).relu())).relu())  # type: ignore[no-any-return]


class Clip(nn.Module):
    """Frames of a clip lie on the batch axis, 8 a clip."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, frames: Tensor) -> Tensor:
        seen = self.body(frames).mean((2, 3)).view(-1, 8, 8)
        return self.head((seen + seen.roll(1, 1).relu()).mean(1))  # type: ignore[no-any-return]


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3)

    def forward(self, images: Any) -> Any:
        assert not isinstance(images, Tensor)
        return [{"boxes": self.body(image[None]).flatten(2)} for image in images]


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + torch.randn_like(x))  # type: ignore[no-any-return]


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.LSTM(8, 16)

    def forward(self, packed: PackedSequence) -> Tensor:
        return self.rows(packed)[1][0][-1]  # type: ignore[no-any-return]


class Alike(nn.Module):
    """Compares every text with every image, as CLIP does."""

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        return text @ image.T


def edges() -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(0)
    return torch.randn(30, 8, generator=made), torch.randint(0, 30, (2, 100), generator=made)


STEPS = (torch.randn(20, 5, 8, generator=torch.Generator().manual_seed(1)),)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("every", [False, True])
def test_time_first_counts_all_steps_of_one_sequence(both: bool, every: bool) -> None:
    net = Recurrent(both=both, every=every)
    assert samples_of(net, STEPS) == Samples("axis", 1, 5)
    found = cost(net, STEPS)
    heads = (20 if every else 1) * net.head.weight.numel()
    assert found.macs == (1 + both) * 20 * ONE_STEP + heads
    assert found.sample == "1 of 5 rows along axis 1"


def test_batch_first_is_as_it_was() -> None:
    net = Recurrent(first=True)
    assert samples_of(net, STEPS) == Samples("axis", 0, 20)
    assert cost(net, STEPS).macs == 5 * ONE_STEP + 64
    assert cost(net, (STEPS[0][:1],)).sample == ""  # one row: nothing to ask
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert samples_of(layer, STEPS).axis == 0
    assert samples_of(nn.TransformerEncoderLayer(8, 2, 16), STEPS).axis == 1


def test_a_graph_is_one_sample() -> None:
    found = cost(Graph(), edges())
    assert found.macs == 30 * (8 * 32 + 32 * 32 + 32 * 4)
    assert found.sample == "the whole example"


def test_frames_of_a_clip_belong_together() -> None:
    one = 8 * 8 * 27 * 36 + 32
    assert cost(Clip(), (torch.randn(8, 3, 8, 8),)).macs == one
    found = cost(Clip(), (torch.randn(24, 3, 8, 8),))
    assert (found.macs, found.sample) == (one, "8 of 24 rows along axis 0")


def test_items_of_lists_are_samples() -> None:
    images = [torch.randn(3, 8, 8 + i) for i in range(4)]
    assert samples_of(Detector(), (images,)) == Samples("items", count=4)
    assert cost(Detector(), (images,)).macs == 8 * 27 * 36
    assert len(one_sample(Detector(), (images,))[0]) == 1  # type: ignore[index]
    pyramid = [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)]  # two images at two sizes
    assert samples_of(Detector(), (pyramid,)).kind == "axis"


def test_packed_sequences_count_their_steps() -> None:
    packed = pack_sequence([torch.randn(5, 8), torch.randn(3, 8)])
    found = cost(Packed(), (packed,))
    assert (found.macs, found.sample) == (5 * ONE_STEP, "1 of 2 packed sequences")
    assert counted((packed,)) == 2


def test_answers_that_depend_on_chance_or_on_the_others_count_by_their_size() -> None:
    assert samples_of(Noisy(), (torch.randn(6, 8),)) == Samples("axis", 0, 6)
    norm = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    assert samples_of(norm, (torch.randn(6, 3, 8, 8),)) == Samples("axis", 0, 6)
    texts = torch.randn(6, 8), torch.randn(3, 8)
    assert [len(t) for t in tensors(one_sample(Alike(), texts))] == [1, 1]


def test_asking_changes_nothing() -> None:
    net = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout()).train()
    state, random = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    samples_of(net, (torch.randn(6, 8, generator=torch.Generator()),))
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert net[1].training


def test_copies_of_a_sample_lie_on_its_own_axis() -> None:
    for net, given, shape in (
        (Recurrent(), STEPS, (20, 7, 8)),
        (Recurrent(first=True), STEPS, (7, 5, 8)),
        (Graph(), edges(), (30, 8)),
    ):
        assert next(tensors(first_sample(given, net, 7))).shape == shape


KINDS: dict[str, tuple[Any, Any]] = {
    "time first": (Recurrent, STEPS),
    "graph": (Graph, edges()),
    "clip": (Clip, (torch.randn(16, 3, 8, 8),)),
    "list": (Detector, ([torch.randn(3, 8, 8)] * 3,)),
    "packed": (Packed, (pack_sequence([torch.randn(5, 8), torch.randn(3, 8)]),)),
}


@pytest.mark.parametrize("kind", ["time first", "graph", "clip", "list"])
def test_such_networks_are_factorized_and_their_cost_is_as_predicted(kind: str) -> None:
    make, example = KINDS[kind]
    result = pliant.compress(
        make(), None, "energy", f"macs={cost(make(), example).macs - 1}", example=example
    )
    assert result.report.met
    assert result.report.after.macs == cost(result.model, example).macs
    assert result.report.inputs["one sample"] == str(samples_of(make(), example))


@pytest.mark.parametrize("kind", KINDS)
def test_pruning_takes_such_networks_or_refuses_them_truly(kind: str) -> None:
    make, example = KINDS[kind]
    try:
        result = pliant.compress(make(), None, "magnitude", "params=0.9", example=example)
    except pliant.PliantError as error:
        assert "no channels that can be removed" in str(error)
        assert "pass an example" not in str(error)
    else:
        assert result.report.after.macs == cost(result.model, example).macs


def test_a_stream_of_time_first_batches_gives_one_sequence_as_example() -> None:
    loader = DataLoader([torch.randn(20, 8) for _ in range(12)], 4,
                        collate_fn=lambda rows: torch.stack(rows, 1))  # fmt: skip
    for data in (Data.of(loader), Data.of([torch.randn(20, 4, 8)] * 3)):
        example = data.example_for(Recurrent())
        assert next(tensors(example)).shape == (20, 1, 8)
        assert cost(Recurrent(), example).macs == 20 * ONE_STEP + 64


def test_a_network_that_takes_no_single_frame_gets_a_whole_batch_as_example() -> None:
    frames = torch.randn(64, 3, 8, 8)
    loader = DataLoader(frames, 16)  # type: ignore[arg-type]
    example = Data.of(loader).example_for(Clip())
    assert cost(Clip(), example).macs == 8 * 8 * 27 * 36 + 32
