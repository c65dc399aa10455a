"""Rows of layers: they belong together, nothing is left behind, and memory stays where it is."""

import pytest
import torch
from torch import Tensor, nn

from pliant import zoo
from pliant.errors import DataError, ModelError
from pliant.observe.rows import Grams, Rows
from pliant.surgery.select import weighted
from pliant.testing import TOYS
from pliant.testing.memory import Peak


class Numbered(nn.Module):
    """Every number of a sample's maps says which sample it is of, and where it lies."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse, self.flat = nn.Identity(), nn.Identity(), nn.Linear(1, 1)
        nn.init.ones_(self.flat.weight)
        nn.init.zeros_(self.flat.bias)

    def forward(self, x: Tensor) -> Tensor:
        number = x[:, :1, :1, :1]
        place = torch.arange(64.0).view(1, 1, 8, 8)
        fine = self.fine(torch.cat([number + 0 * place, place + 0 * number], 1))
        self.coarse(fine[..., ::2, ::2])
        return self.flat(fine.mean((2, 3))[:, :1])


def numbered(count: int = 6) -> tuple[Tensor]:
    return (torch.arange(float(count)).view(-1, 1, 1, 1),)


@pytest.mark.parametrize("form", ["mean", "flat", "pixels"])
def test_rows_of_all_layers_belong_to_the_same_samples(form):
    layers = ("flat", "fine", "coarse", "")
    found = Rows(Numbered(), layers, form=form, pixels=5).all([numbered(4), numbered(6)])
    each = 5 if form == "pixels" else 1
    number = torch.cat([torch.arange(4.0), torch.arange(6.0)]).repeat_interleave(each)
    assert list(found) == list(layers)
    for name, rows in found.items():
        assert torch.equal(rows[:, 0], number), name


def test_pixels_of_layers_of_different_size_lie_at_the_same_place():
    rows = Rows(Numbered(), ("fine", "coarse"), form="pixels", pixels=40).of(numbered())
    place, seen = rows["fine"][:, 1].long(), rows["coarse"][:, 1].long()
    assert torch.equal(seen, place // 16 * 16 + place % 8 // 2 * 2)
    assert len(place.unique()) > 50  # anew for each sample, all over the map


def test_pixels_are_those_of_the_generator():
    def drawn(seed: int) -> Tensor:
        reader = Rows(
            *(Numbered(), ("fine",)),
            form="pixels",
            generator=torch.Generator().manual_seed(seed),
        )
        return reader.of(numbered())["fine"]

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


def test_inputs_and_outputs_are_those_of_the_layer():
    model, x = TOYS["bare"].model().eval(), torch.randn(3, 3, 6, 6)
    last = model[8]
    read = Rows(model, ("8",), side="input").of((x,))["8"]
    gave = Rows(model, ("8",)).of((x,))["8"]
    assert torch.allclose(last(read), gave, atol=1e-6)
    hidden = model[0](x)  # before the ReLU that works in place on it
    assert torch.equal(Rows(model, ("0",), form="flat").of((x,))["0"], hidden.flatten(1))


def test_channels_of_words_are_last():
    model, x = TOYS["transformer"].model().eval(), torch.randn(2, 5, 6)
    found = Rows(model, ("embed",)).of((x,))["embed"]
    assert torch.allclose(found, model.embed(x).mean(1), atol=1e-6)


def test_a_form_of_ones_own_sees_the_map():
    peaks = Rows(Numbered(), ("fine",), form=lambda maps: maps.amax((2, 3))).of(numbered())
    assert torch.equal(peaks["fine"], torch.stack([torch.arange(6.0), torch.full((6,), 63.0)], 1))


def test_the_scores_of_the_network_come_with_any_side_and_form():
    model, x = TOYS["residual"].model().eval(), torch.randn(3, 3, 6, 6)
    for how in ({"side": "input"}, {"form": lambda maps: maps.amax((2, 3))}, {"form": "flat"}):
        assert torch.allclose(Rows(model, ("stem", ""), **how).of((x,))[""], model(x), atol=1e-6)


@pytest.mark.parametrize("name", TOYS)
def test_grams_are_products_of_the_rows_in_float64(name):
    toy = TOYS[name]
    model, inputs = toy.model(), toy.inputs(12)[0]
    batches = [(inputs[:5],), (inputs[5:],)]
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)][-2:]
    for form in ("mean", "pixels"):
        pairs = [(one, other) for one in layers for other in layers]
        readers = [Rows(model, layers, form=form) for _ in range(2)]
        rows = {n: x.double() for n, x in readers[0].all(batches).items()}
        found = readers[1].grams(batches, pairs)
        for one, other in pairs:
            x, y = rows[one], rows[other]
            assert found.gram(one, other).dtype == torch.float64
            assert torch.allclose(found.gram(one, other), x.T @ y, rtol=1e-12, atol=1e-12)
            centred = (x - x.mean(0)).T @ (y - y.mean(0)) / len(x)
            assert torch.allclose(found.covariance(one, other), centred, atol=1e-9)
        assert found.count == len(rows[layers[0]])


def test_small_differences_survive_in_the_gram():
    """What float32 would round away: rows near 4096 whose variance is 1e-4."""
    rows = 4096 + 0.01 * torch.randn(4096, 2, generator=torch.Generator().manual_seed(0))
    found = Grams()
    for part in rows.split(64):
        found.add({"a": part}, [("a", "a")])
    assert torch.allclose(found.covariance("a"), rows.double().T.cov(correction=0), rtol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_looking_is_done_in_eval_mode_and_leaves_the_network_alone(training):
    toy = TOYS["plain"]
    model, x = toy.model().train(training), toy.inputs(8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    whole, halves = (
        Rows(model, ("12",)).all([x]),
        Rows(model, ("12",)).all([(x[0][:4],), (x[0][4:],)]),
    )
    assert torch.allclose(whole["12"], halves["12"], atol=1e-6)  # no dropout, no batch statistics
    assert model.training == training and not whole["12"].requires_grad
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_hooks_come_off_after_exceptions_and_between_batches():
    toy = TOYS["plain"]
    model = toy.model().train()

    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in model.modules())

    stream = Rows(model, ("0", "12")).stream([toy.inputs(4), toy.inputs(4)])
    next(stream)
    assert not hooks() and model.training  # whoever stops here leaves nothing
    for broken in ((torch.randn(2, 5, 6, 6),), (torch.full((2, 3, 6, 6), torch.nan),)):
        with pytest.raises(ModelError):
            Rows(model, ("0", "12")).all([toy.inputs(4), broken])
        assert not hooks() and model.training

    def fails(maps: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Rows(model, ("0",), form=fails).grams([toy.inputs(4)])
    assert not hooks() and model.training


def peak_of(work: str, form: str, count: int) -> int:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    with Peak() as peak:
        batches = ((torch.randn(32, 3, 8, 8),) for _ in range(count))
        getattr(Rows(model, ("0", "2"), form=form), work)(batches)
    return peak.bytes


@pytest.mark.parametrize("form", ["mean", "flat", "pixels"])
def test_memory_does_not_grow_with_the_number_of_batches(form):
    assert peak_of("grams", form, 12) <= 1.01 * peak_of("grams", form, 2)


def test_growing_memory_would_be_seen():
    assert peak_of("all", "flat", 12) > 3 * peak_of("all", "flat", 2)


def bytes_of(network: str, batch: int, pixels: int = 8) -> tuple[int, int, int]:
    """The peak of a forward call, that of products of all layers, and the most between them."""
    model = zoo.build(network).eval()
    layers = {name: layer for name, layer in weighted(model).items() if hasattr(layer, "stride")}
    images = (torch.randn(batch, 3, 32, 32),)
    with Peak() as alone, torch.no_grad():
        model(*images)
    with Peak() as peak:
        Rows(model, list(layers), form="pixels", pixels=pixels).grams([images, images])
    widths = [len(layer.weight) for layer in layers.values()]  # type: ignore[arg-type]
    numbers = batch * pixels * sum(widths)
    bound = (4 + 8) * numbers + 2 * 8 * sum(width**2 for width in widths)
    return alone.bytes, peak.bytes, bound


@pytest.mark.slow  # VGG-16 at batch 256
def test_products_of_all_layers_of_vgg16_need_what_the_docs_say() -> None:
    """Rows of one batch, once more in float64, and the products twice, beside the forward call."""
    alone, peak, bound = bytes_of("vgg16-bn", 256)
    assert alone < peak <= 1.05 * (alone + bound)
    assert peak < 500e6


def test_one_may_stop_after_so_many_samples():
    reader = Rows(Numbered(), ("fine",))
    assert len(reader.all([numbered(4)] * 5, most=7)["fine"]) == 8
    assert reader.grams([numbered(4)] * 5, most=4).count == 4


class Choosy(nn.Module):
    """Calls one of its layers for large batches only, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.never = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.pair = nn.LSTM(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.pair(x)
        return self.sometimes(self.always(x)) if len(x) > 3 else self.always(x)


def test_bad_requests_are_refused_in_a_sentence():
    model, x = Choosy(), (torch.randn(4, 2),)
    assert list(Rows(model, ("never", "always")).of(x)) == ["always"]
    assert Rows(model, ("never",)).all([x]) == {} and not Rows(model, ("never",)).grams([x]).sums
    for given, words in (
        (lambda: Rows(model, ("missing",)), "'missing'"),
        (lambda: Rows(model, ()), "must be submodules"),
        (lambda: Rows(model, ("always",), pixels=0), "At least 1 pixel"),
        (lambda: Rows(model, ("pair",)).of(x), "one tensor with a row for"),
        (lambda: Rows(model, ("always", "sometimes")).all([x, (x[0][:2],)]), "some batches only"),
        (lambda: Rows(model, ("always", "sometimes")).grams([x, (x[0][:2],)]), "some batches only"),
    ):
        with pytest.raises(ModelError, match=words):
            given()
    for empty in (Rows(model, ("always",)).all, Rows(model, ("always",)).grams):
        with pytest.raises(DataError, match="no batch came"):
            empty([])
