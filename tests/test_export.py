"""ONNX and PyTorch programs: equal outputs for any batch, or one sentence and no file."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant import zoo
from pliant.edits import Factor
from pliant.errors import ArtifactError, MissingExtraError, ModelError, OutputError
from pliant.files import artifact
from pliant.files import onnx as export
from pliant.files.onnx import Exported, to_onnx, to_program
from pliant.math.forms import forms_for, max_ranks
from pliant.surgery import select as layers


def signal() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 6, 5, stride=2, padding=2, padding_mode="reflect"),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def every_form(model: nn.Module) -> nn.Module:
    """Factorize layer after layer, every form in turn, at half of the ranks."""
    used = set()
    for index, (name, layer) in enumerate(layers.factorizable(model)[0].items()):
        shape = tuple(layer.weight.shape)
        forms = forms_for(shape)
        form = forms[index % len(forms)]
        ranks = tuple(max(1, most // 2) for most in max_ranks(shape, form))
        Factor(name, form, ranks).apply(model)
        used.add(form)
    assert used >= {"tucker2", "input", "output", "spatial", "svd"}
    return model


def noise(*shape: int) -> tuple[Tensor]:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)


CASES: list[Any] = [
    pytest.param(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (4, 6)),
    pytest.param(signal, (1, 4, 20)),
    pytest.param(lambda: zoo.build("lenet5"), (2, 1, 28, 28)),
    pytest.param(lambda: zoo.build("resnet20"), (1, 3, 32, 32), marks=pytest.mark.slow),
    pytest.param(lambda: every_form(zoo.build("resnet20")), (1, 3, 32, 32), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    ("build", "shape"), CASES, ids=["linear", "conv1d", "lenet5", "resnet20", "every-form"]
)
def test_onnx_gives_equal_outputs_for_any_batch(
    build: Callable[[], nn.Module], shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Slow by nature: PyTorch traces, decomposes and optimizes the graph."""
    import onnx
    import onnxruntime

    torch.manual_seed(0)
    model, example = build().train(), noise(*shape)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done = to_onnx(model, tmp_path / "model.onnx", example)
    assert isinstance(done, Exported) and done.path == tmp_path / "model.onnx"
    assert 0 <= done.max_difference <= 1e-4 and done.bytes == done.path.stat().st_size
    assert list(tmp_path.iterdir()) == [done.path]
    graph = onnx.load(done.path)
    assert graph.opset_import[0].version == done.opset
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    x = noise(5, *shape[1:])[0]
    session = onnxruntime.InferenceSession(done.path)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), torch.as_tensor(found), atol=1e-4)


class Two(nn.Module):
    """Two named inputs of different types, one without a batch, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(11, 4), nn.Linear(4, 4)

    def forward(
        self, ids: Tensor, scale: Tensor, weight: Tensor, twice: bool = False
    ) -> dict[str, Tensor]:
        seen = self.mix(self.embed(ids)) * scale[:, None, None] + weight
        return {"first": seen * 2 if twice else seen, "last": seen[:, -1]}


def two() -> dict[str, Any]:
    return {
        "ids": torch.arange(10).reshape(2, 5),
        "weight": torch.randn(4),
        "scale": torch.tensor([1.0, 2.0]),
        "twice": True,
    }


@pytest.mark.slow
def test_named_inputs_and_several_outputs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also: an exporter's chatter about itself reaches nobody."""
    done = to_onnx(Two(), tmp_path / "two.onnx", two(), opset=19)
    assert done.opset == 19 and done.max_difference < 1e-4
    out, err = capfd.readouterr()
    assert not out and not err
    assert logging.getLogger("torch.onnx").isEnabledFor(logging.ERROR)


@pytest.mark.parametrize("build", [signal, Two])
def test_a_program_gives_equal_outputs_for_any_batch(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = build().train()
    example = two() if isinstance(model, Two) else noise(1, 4, 20)
    program = to_program(model, example, tmp_path / "model.pt2")
    assert model.training and list(tmp_path.iterdir()) == [tmp_path / "model.pt2"]
    assert len(program.graph_signature.user_inputs) == len(example)
    if not isinstance(model, Two):
        x = noise(5, 4, 20)[0]
        back = torch.export.load(tmp_path / "model.pt2").module()
        with torch.no_grad():
            assert torch.equal(model.eval()(x), back(x))


# ---------------------------------------------------------------- refusals


class Moody(nn.Module):
    """Chooses by the value of a tensor: nothing that traces can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


class Rigid(Moody):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).reshape(2, 2, 2)


@pytest.mark.parametrize("build", [Moody, Rigid])
def test_what_cannot_be_exported_gets_one_sentence(build: type[nn.Module], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"{build.__name__} cannot be exported as") as caught:
        to_program(build(), noise(2, 4), tmp_path / "a.pt2")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (Moody, ModelError, "Moody cannot be exported as ONNX"),
        (Rigid, ArtifactError, "bound to one size of batch"),
    ],
)
def test_onnx_of_what_cannot_be_exported_leaves_no_file(
    build: type[nn.Module], error: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says) as caught:
        to_onnx(build(), tmp_path / "a.onnx", noise(2, 4))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_opset_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="asked for in opset 3"):
        to_onnx(nn.Sequential(nn.Linear(4, 4)), tmp_path / "a.onnx", noise(2, 4), opset=3)
    assert not list(tmp_path.iterdir())


def test_an_example_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ModelError, match="must run on the example before"):
        to_program(nn.Linear(4, 4), noise(2, 5))


@pytest.mark.parametrize("example", [(), (3,), {"x": 1}, (torch.tensor(1.0),), noise(0, 4)])
def test_an_example_without_a_batch_is_refused(example: Any, tmp_path: Path) -> None:
    for write in (
        lambda: to_onnx(nn.Linear(4, 4), tmp_path / "a", example),
        lambda: to_program(nn.Linear(4, 4), example),
    ):
        with pytest.raises(ModelError, match="first axis is the batch"):
            write()


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = nn.Linear(4, 4)
    model.stream = (value for value in [])
    with pytest.raises(ModelError, match="copied before it is exported"):
        to_program(model, noise(1, 4))


@pytest.mark.slow
def test_outputs_that_differ_leave_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"\x08old")
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ArtifactError, match="differ by up to .* where -1 is allowed"):
        to_onnx(model, path, noise(1, 4), tolerance=-1)
    assert path.read_bytes() == b"\x08old" and list(tmp_path.iterdir()) == [path]
    program = tmp_path / "a.pt2"
    to_program(model, noise(1, 4), program)
    old = program.read_bytes()
    monkeypatch.setattr(export, "_difference", lambda *_: float("nan"))
    with pytest.raises(ArtifactError, match="differ by up to nan"):
        to_program(model, noise(1, 4), program)
    assert program.read_bytes() == old


@pytest.mark.parametrize("suffix", ["txt", "pliant"])
def test_a_file_of_another_kind_is_not_replaced(suffix: str, tmp_path: Path) -> None:
    model, path = nn.Sequential(nn.Linear(4, 4)), tmp_path / f"keep.{suffix}"
    path.write_text("three years") if suffix == "txt" else artifact.save(path, model, ())
    old = path.read_bytes()
    with pytest.raises(OutputError, match="another kind of file is there"):
        to_onnx(model, path, noise(1, 4))
    with pytest.raises(OutputError, match="another kind of file is there"):
        to_program(model, noise(1, 4), path)
    assert path.read_bytes() == old


def test_a_program_is_written_over_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "a.pt2"
    for width in (4, 3):
        to_program(nn.Sequential(nn.Linear(width, 4)), noise(1, width), path)
    assert torch.export.load(path).module()(*noise(1, 3)).shape == (1, 4)


def test_differences_see_shapes_and_numbers() -> None:
    one = torch.ones(2)
    assert export._difference([one, one], [one, one + 0.5]) == 0.5
    for other in (torch.ones(3), one * torch.nan, one * torch.inf):
        assert export._difference([one], [other]) == float("inf")


def test_places_that_cannot_be_written_are_output_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, example = nn.Sequential(nn.Linear(4, 4)), noise(1, 4)
    with pytest.raises(OutputError, match="choose a folder that exists"):
        to_program(model, example, tmp_path / "missing" / "a.pt2")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left"):
        to_program(model, example, tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_large_weights_lie_beside_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "ONE_FILE", 1000)
    done = to_onnx(nn.Sequential(nn.Linear(100, 100)), tmp_path / "a.onnx", noise(1, 100))
    files = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert set(files) == {"a.onnx", "a.onnx.data"} and sum(files.values()) == done.bytes
    assert files["a.onnx.data"] >= 40_000


def test_without_the_extra_the_message_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(MissingExtraError, match=r'pip install "pliant\[onnx\]"'):
        to_onnx(nn.Linear(4, 4), tmp_path / "a.onnx", noise(1, 4))


class KeepsCache:
    """Keys and values for the next call, in a class that exporters do not know."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


class Decoder(nn.Module):
    """Answers by name, with what it keeps for its next call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        return {"logits": self.inner(x) * scale, "past_key_values": KeepsCache(x)}


def test_what_a_network_keeps_for_its_next_call_is_not_exported(tmp_path: Path) -> None:
    model, x = Decoder().eval(), torch.randn(2, 6)
    exported = to_onnx(model, tmp_path / "m.onnx", {"x": x})
    assert exported.max_difference < 1e-5 and "forward" not in vars(model)
    assert set(to_program(model, (x,)).module()(x)) == {"logits"}
    rounded = pliant.compress(model, torch.randn(32, 6), "groupwise_ptq(independent=1, joint=1)")
    to_onnx(rounded.model, tmp_path / "q.onnx", {"x": x})
    assert b"QuantizeLinear" in (tmp_path / "q.onnx").read_bytes()


class Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x * (torch.rand_like(x) < 0.5)).relu())
        return out


def test_a_network_that_draws_at_random_is_compared_by_the_same_draws(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Drawing(), torch.randn(64, 8)
    for method in ("groupwise_ptq(bits=8, independent=1, joint=1)", "magnitude"):
        found = pliant.compress(model, x, method, "bytes=0.95").report.fidelity
        assert found is not None and found.error < 0.2
    with pytest.raises(ArtifactError, match="draws random numbers"):
        to_onnx(model, tmp_path / "m.onnx", (x,))


def test_attention_over_windows_and_inputs_within_inputs_are_exported(tmp_path: Path) -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(8, 24)

        def forward(self, given: dict[str, Any]) -> Tensor:
            x = given["parts"][0] + given["parts"][1]
            parts = self.mix(x).unflatten(1, (2, 3)).unsqueeze(1).chunk(3, -1)  # (N, 1, 2, 3, 8)
            return nn.functional.scaled_dot_product_attention(*parts).flatten(1)

    example = ({"parts": (torch.randn(2, 6, 8), torch.randn(2, 6, 8))},)
    assert to_onnx(Windows(), tmp_path / "windows.onnx", example).max_difference < 1e-5


@dataclass
class Found:
    """What `Wrapped` gives."""

    scores: Tensor
    more: dict[str, Any]


class Wrapped(nn.Module):
    """Passes on whatever it is given, and answers with a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Found:
        scores = self.layer(x + sum(more) + sum(named.values()))
        return Found(scores, {"two": scores * 2, "name": "x"})


def test_inputs_without_names_and_outputs_of_own_classes_are_exported(tmp_path: Path) -> None:
    """An exporter knows neither."""
    x = noise(3, 4)[0]
    to_onnx(Wrapped(), tmp_path / "a.onnx", (x, x))
    named = to_onnx(Wrapped(), tmp_path / "b.onnx", {"x": x, "other": x})
    assert named.max_difference < 1e-5


def test_networks_of_16_bits_may_differ_by_their_own_precision(tmp_path: Path) -> None:
    """Two runtimes round sums of half precision in two ways."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 4)).half()
    example = (torch.randn(8, 32).half() * 10,)
    assert to_onnx(net, tmp_path / "half.onnx", example).max_difference < 0.05
