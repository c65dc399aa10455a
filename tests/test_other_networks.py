"""Networks as other people write them: each compressed, or refused in a true sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pliant
import pliant.render.words
from pliant.cost import layer_costs
from pliant.edits.quantize import unpackable
from pliant.nn.attention import SplitAttention
from pliant.nn.layers import obstacle

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 4


def mlp() -> nn.Sequential:
    """A small network."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def test_where_nothing_is_factorized_outputs_stay() -> None:
    """Batch norms are not re-estimated for nothing."""
    net = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4)).eval()
    result = pliant.compress(net, (X, Y), "energy(p=1.0)")
    assert not [row for row in result.report.layers if row.form != "dense"]
    with torch.no_grad():
        assert torch.equal(net(X), result.model(X))


class Spread(nn.Module):
    """Answers with a number for each sample, too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made = torch.distributions.Normal(self.net(x), 1.0)
        return made.mean, made.entropy().sum(1)


def test_a_number_for_each_sample_may_be_an_output() -> None:
    """Marks arrive in outputs of one axis."""
    result = pliant.compress(Spread(), None, "magnitude", "params=0.6", example=X)
    assert result.report.met


class Overwrites(nn.Module):
    """Changes in place what its gradients need."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.next = nn.Linear(8, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu_()
        x += self.next(x)
        found: Tensor = self.head(x)
        return found


def test_a_network_without_gradients_is_looked_at_without_them_or_refused_in_words() -> None:
    """Statistics do without; training says what is wrong."""
    assert pliant.compress(Overwrites(), (X, Y), "nrmf", "params=0.6").report.met
    with pytest.raises(pliant.PliantError, match=r"Overwrites must have gradients .*x = x \+ y"):
        pliant.compress(Overwrites(), (X, Y), "groupwise_ptq(independent=1, joint=1)")


def test_a_file_is_loaded_into_what_is_inside_a_wrapper(tmp_path: Path) -> None:
    """As a network is compressed inside it."""
    wrapped: Any = nn.DataParallel(mlp())
    result = pliant.compress(wrapped, (X, Y), "energy", "params=0.6")
    result.save(tmp_path / "net.pliant")
    for model in (nn.DataParallel(mlp()), lambda: nn.DataParallel(mlp())):
        loaded = pliant.load(tmp_path / "net.pliant", model)
        assert torch.equal(loaded(X), result.model(X))


def test_sparse_weights_are_refused_in_a_sentence() -> None:
    """They cannot even be copied."""
    net = mlp()
    sparse = net[2].weight.detach().to_sparse()
    net[2].weight = nn.Parameter(sparse, requires_grad=False)
    with pytest.raises(pliant.PliantError, match="'2.weight' is a sparse one"):
        pliant.compress(net, (X, Y), "energy", "params=0.6")


def test_a_weight_that_is_a_buffer_is_called_one() -> None:
    """No hook computes it."""
    net: Any = mlp()
    values = net[2].weight.detach().clone()
    del net[2].weight
    net[2].register_buffer("weight", values)
    assert "is a buffer" in str(obstacle(net, "2"))
    assert "is a buffer" in str(unpackable(net, "2"))


class Bag(nn.Module):
    """Reads bags of words."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.net = nn.EmbeddingBag(20, 8), mlp()

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.net(self.table(ids))
        return found


REASONS = {
    "energy": "EmbeddingBag sums rows while it looks them up, and has no factorized form here",
    "magnitude": "EmbeddingBag keeps its channels",
    "groupwise_ptq(independent=0, joint=0)": "no packed form does with its weight what Embedding",
}


@pytest.mark.parametrize("method", REASONS)
def test_every_family_says_in_its_words_why_a_bag_stays(method: str) -> None:
    """It is none of the layers with one kernel."""
    ids = torch.randint(0, 20, (32, 5), generator=torch.Generator().manual_seed(0))
    budget = None if "ptq" in method else "params=0.7"
    report = pliant.compress(Bag(), (ids, Y), method, budget).report
    (row,) = [row for row in report.layers if row.layer == "table"]
    assert row.form == "dense"
    assert REASONS[method] in row.reason


def test_channels_pass_a_batch_norm_that_keeps_no_statistics() -> None:
    """It mixes samples, but no channels."""
    norm = nn.BatchNorm1d(16, track_running_stats=False)
    net = nn.Sequential(nn.Conv1d(3, 16, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(16 * 6, 4))
    images = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    report = pliant.compress(net, None, "magnitude", "params=0.6", example=images).report
    assert report.met


class Fours(nn.Module):
    """Works where the channels of its first layer are a multiple of four."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.next, self.head = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        with torch.no_grad():
            self.first.weight[:5] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if x.shape[-1] % 4:
            raise ValueError("not a multiple of four")
        found: Tensor = self.head(self.next(x).relu())
        return found


CUTS: dict[str, Any] = {
    "magnitude": ((X, Y), "magnitude", "params=0.6"),
    "asrfp": ((X, Y), "asrfp(ratio=0.3)", None),
}


@pytest.mark.parametrize("method", CUTS)
def test_a_group_that_fails_the_last_proof_stays_and_the_rest_is_cut(method: str) -> None:
    """Half of its channels might leave, but not as many as is planned."""
    torch.manual_seed(0)
    result = pliant.compress(Fours(), *CUTS[method])
    rows = {row.layer: row for row in result.report.layers}
    assert rows["first"].form == "dense"
    assert "multiple of four" in rows["first"].reason
    assert rows["next"].kept
    assert result.report.met


class Amplified(nn.Module):
    """Makes large errors of small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head((self.first(x) * 200).sin())
        return found


def test_a_report_warns_where_outputs_are_far_from_what_they_were() -> None:
    """Where nothing is scored, nobody else would."""
    torch.manual_seed(0)
    rounded = "groupwise_ptq(independent=0, joint=0)"
    far = pliant.compress(Amplified(), X, rounded).report
    assert far.fidelity is not None and far.fidelity.error > 0.5
    assert "Outputs differ from the dense network's by" in far.findings[0]
    assert far.findings[0] in pliant.render.words.verdict(far)
    assert not pliant.compress(mlp(), X, rounded).report.findings


class Sized(nn.Module):
    """Tells a transposed convolution the size of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 12, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.up(self.down(x).relu(), output_size=x.shape[2:])
        return found


@pytest.mark.parametrize(
    ("again", "budget"),
    [("energy", "params=0.8"), ("groupwise_ptq(independent=1, joint=1)", None), ("hac", None)],
)
def test_the_size_of_an_output_reaches_what_was_compressed_twice(
    again: str, budget: str | None, tmp_path: Path
) -> None:
    """A factor of a transposed convolution may be factorized, rounded or coded itself."""
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    once = pliant.compress(Sized(), images, "energy(only=['up'])", "params=0.7")
    twice = pliant.compress(once.model, images, again, budget)
    assert twice.model(images).shape == (8, 12, 8, 8)
    twice.save(tmp_path / "net.pliant")
    loaded = pliant.load(tmp_path / "net.pliant", Sized())
    assert torch.equal(loaded.eval()(images), twice.model(images))


def test_attention_with_keys_of_its_own_exports_with_any_batch() -> None:
    """Its size is no number in the graph."""
    packed = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)
    split, words = SplitAttention(packed).eval(), torch.randn(2, 5, 8)
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {"query": {0: batch}, "key": {0: batch}, "value": {0: batch}}
    graph = torch.export.export(split, (words, words, words), dynamic_shapes=shapes).module()
    more = torch.randn(3, 5, 8)
    assert torch.allclose(graph(more, more, more)[0], packed.eval()(more, more, more)[0], atol=1e-6)


def test_a_rounded_network_of_double_precision_exports(tmp_path: Path) -> None:
    """Its rounded layers compute in single precision there."""
    result = pliant.compress(mlp().double(), X.double(), "groupwise_ptq(independent=0, joint=0)")
    written = pliant.to_onnx(result.model, tmp_path / "net.onnx", (X[:2].double(),))
    assert written.path.exists()


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_transposed_convolutions_of_groups_are_rounded_at_the_bytes_foreseen(groups: int) -> None:
    """Their weights list the outputs of one group only."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv1d(1, 16, 3), nn.ConvTranspose1d(16, 32, 3, groups=groups), nn.ReLU()),
        nn.Conv1d(32, 1, 3),
    )
    method = "groupwise_ptq(independent=0, joint=0)"
    result = pliant.compress(net, X[:, None], method)
    edit = next(edit for edit in result.edits if edit.layer == "1")
    inputs = (X[:1, None],)
    before, after = (layer_costs(each, inputs)["1"] for each in (net, result.model))
    assert edit.predict(before).bytes == after.bytes


class Recomputes(nn.Module):
    """Saves memory in training, as it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.head = nn.Linear(8, 32), mlp()[2:4], nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        found: Tensor = self.head(checkpoint(self.block, x, use_reentrant=False))
        return found


def test_networks_that_recompute_their_features_are_fitted() -> None:
    """What is compared with the dense network is no part of what is computed again."""
    method = "groupwise_ptq(independent=1, joint=2)"
    rows = pliant.compress(Recomputes(), (X, Y), method).report.layers
    assert [row.form for row in rows] == ["w8a8", "w4a4", "w8a8"]


def test_a_projected_lstm_is_said_to_have_no_operator(tmp_path: Path) -> None:
    """It is no matter of batches."""
    net = nn.LSTM(4, 8, proj_size=3, bidirectional=True, batch_first=True)
    with pytest.raises(pliant.PliantError, match="proj_size has no operator"):
        pliant.to_onnx(net, tmp_path / "net.onnx", (torch.randn(2, 5, 4),))


class Reads(nn.Module):
    """Two layers that are read by one which no family can change, and one of a class of its own."""

    def __init__(self, reader: nn.Module) -> None:
        super().__init__()
        self.first, self.reader, self.own = nn.Linear(8, 16), reader, Doubles(16, 32)
        self.next, self.head = nn.Linear(32, 32), nn.Linear(32, 4)
        self.spare = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = self.reader(x, x) if isinstance(self.reader, nn.Bilinear) else self.reader(x[:, None])
        x = x if isinstance(x, Tensor) else x[0][:, 0]
        found: Tensor = self.head(self.next(self.own(x).relu()).relu())
        return found


class Doubles(nn.Linear):
    """Is no Linear, whatever it is derived from."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize("reader", [nn.Bilinear(16, 16, 16), nn.GRU(16, 16, batch_first=True)])
def test_reasons_of_channels_are_in_words_of_channels(reader: nn.Module) -> None:
    """What has no factorized form may lose channels, and what is read is no output."""
    torch.manual_seed(0)
    report = pliant.compress(Reads(reader), (X, Y), "magnitude", "params=0.9").report
    reasons = {row.layer: row.reason for row in report.layers}
    kind = type(reader).__name__
    assert reasons["first"] == f"{kind} reader reads them, whose matrices stay whole"
    assert reasons["own"] == "Doubles computes something else than its base class"
    assert reasons["spare"] == "never called in a forward pass"
    assert "factorized" not in str(reasons["reader"])


class Up(nn.ConvTranspose1d):
    """A transposed convolution of somebody's own, which changes nothing."""


class Rows(nn.Embedding):
    """A table of somebody's own, which changes nothing."""


class Shifted(nn.Embedding):
    """Reads other rows than it is asked for, beyond those of the example."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(torch.where(input > 90, input - 90, input))


class Words(nn.Module):
    """Reads words, and makes the sentence longer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.other = Rows(100, 32), Shifted(100, 32)
        self.up, self.head = Up(32, 32, 3, padding=1), nn.Linear(32, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = (self.table(ids) + self.other(ids)).transpose(1, 2)
        found: Tensor = self.head(self.up(x).relu().mean(2))
        return found


def test_classes_that_change_nothing_are_taken_as_what_they_derive_from(tmp_path: Path) -> None:
    """Shown by what they compute, for all rows of a table."""
    torch.manual_seed(0)
    ids = torch.randint(0, 90, (32, 5))
    result = pliant.compress(net := Words(), (ids, Y), "energy", "params=0.7")
    rows = {row.layer: row for row in result.report.layers}
    assert rows["table"].form == "plain+svd"
    assert rows["up"].form.startswith("plain+tucker")
    assert "computes something else" in str(rows["other"].reason)
    result.save(tmp_path / "net.pliant")
    assert torch.equal(pliant.load(tmp_path / "net.pliant", net)(ids), result.model(ids))


class TimeFirst(nn.Module):
    """Puts time before samples, as PyTorch's transformers do unless they are told."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 32)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([x, x * 2, x - 1])  # three times
        found: Tensor = self.head(self.block(x).mean(0))
        return found


def test_channels_leave_where_time_comes_first() -> None:
    """Marks lie in samples on the second axis."""
    torch.manual_seed(0)
    result = pliant.compress(TimeFirst(), (X, Y), "magnitude", "params=0.7")
    forms = {row.layer: row.form for row in result.report.layers}
    assert forms["block.linear1"] == forms["block.linear2"] == "pruned"
