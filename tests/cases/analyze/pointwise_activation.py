"""Evidence of single positions where it can be seen by hand, and networks that count places."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import pliant
from pliant.data import Data
from pliant.errors import PliantError
from pliant.families.analyze import arrange
from pliant.families.analyze.heads import find_head, maps
from pliant.result import Curves, Finding, Heat
from pliant.testing import TOYS, Case


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomness() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def net(*head: nn.Module) -> nn.Sequential:
    """A map of (6, 4, 4) of 4x4 images, which a head reads; layer 1 gives the map."""
    layers = (nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), *head)
    return seeded(lambda: nn.Sequential(*layers))  # type: ignore[return-value]


def on_means() -> nn.Sequential:
    return net(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


def on_numbers() -> nn.Sequential:
    return net(nn.Flatten(), nn.Linear(96, 3))


def evidence_and_bias_are_the_scores() -> None:
    """|sum over positions of E_k + b_k - z_k| < 1e-5 max(1, |z_k|), every class and image."""
    known = ("plain", "residual", "grouped", "shared", "signal", "volume", "single")
    networks = {name: (TOYS[name].model(), TOYS[name].inputs(16)[0]) for name in known}
    networks["numbers"] = (on_numbers(), noise(16, 2, 4, 4))
    pooled = net(nn.AvgPool2d(2, ceil_mode=True, padding=1), nn.Flatten(), nn.Linear(54, 3))
    networks["padded"] = (pooled, noise(16, 2, 4, 4))
    for name, (model, inputs) in networks.items():
        head = find_head(model, inputs[:4])
        seen, scores = maps(model, head, inputs)
        evidence = head.evidence(seen)
        assert evidence.shape == (16, scores.shape[1], *head.shape[1:]), name
        told = evidence.flatten(2).sum(2) + head.bias
        limit = 1e-5 * scores.abs().clamp_min(1)
        assert ((told - scores).abs() < limit).all() and head.bias.shape == scores.shape[1:], name


def the_evidence_of_a_position_is_its_share_of_the_mean() -> None:
    """E_k(u, v) = sum_c W[k, c] phi[c, u, v] / (H W), and W[k, c, u, v] of a head on numbers."""
    for model, pooled in ((on_means(), True), (on_numbers(), False)):
        inputs = noise(3, 2, 4, 4)
        phi = model[:2](inputs).detach()
        weight = model[-1].weight.detach()
        head = find_head(model, inputs)
        assert (
            head.pooled == pooled and head.shape == (6, 4, 4) and head.layer == str(len(model) - 1)
        )
        found = head.evidence(phi)[1, 2, 3, 1]
        taken = weight[2] / 16 if pooled else weight.reshape(3, 6, 4, 4)[2, :, 3, 1]
        assert abs(float(found - taken @ phi[1, :, 3, 1])) < 1e-6


def only_heads_on_means_ignore_the_order_of_positions() -> None:
    """Both run for real, with the map permuted on its way to the head."""
    inputs = noise(8, 2, 4, 4)
    for model, ignored in ((on_means(), True), (on_numbers(), False)):

        def mix(seen: Tensor) -> Tensor:
            return arrange.permute_positions(seen, randomness())

        before = model(inputs)
        with arrange.rearranged(model, "1", mix):
            change = float((model(inputs) - before).detach().abs().max())
        assert (change < 1e-5) == ignored and (ignored or change > 1e-2)
        assert torch.equal(model(inputs), before)  # the hook came off
        data = Data(test=[(inputs,)])
        found = pliant.analyze(model, data, "pointwise_activation(grids=[2])")
        assert (found.values["permuted"] < 1e-5) == ignored
        assert 0 < found.values["exactness"] < 1e-5
        said = "does not change scores" if ignored else "changes scores"
        assert said in found.text and "Operationalized" in found.text


class Brightness(nn.Module):
    """Decides by how many pixels are bright, wherever they are."""

    def forward(self, x: Tensor) -> Tensor:
        bright = (x > 0).float()
        return torch.cat([bright, 0.5 + 0 * x], 1).mean((2, 3))


class Corner(nn.Module):
    """Decides by what is bright in the upper left corner: arrangement is all that counts."""

    def forward(self, x: Tensor) -> Tensor:
        where = torch.zeros(8, 8)
        where[0, 0] = 64
        return torch.cat([x * where, -x * where], 1).mean((2, 3))


class Settled(nn.Module):
    """Has one answer for everything."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([0 * x + 2, 0 * x], 1).mean((2, 3))


def shuffling_speaks_for_and_against() -> None:
    """All decisions stay, they fall to chance, or they stay and chance says the same."""
    inputs = noise(60, 1, 8, 8)
    wanted = {Brightness: (1.0, 0.3, 0.7), Corner: (0.5, 0.3, 0.7), Settled: (1.0, 1.0, 1.0)}
    for kind, (share, low, high) in wanted.items():
        found = pliant.analyze(kind(), inputs, "pointwise_activation(grids=[8])")
        row = found.rows[0]
        assert abs(row["agreement"] - share) < 0.1 and low <= row["chance"] <= high, kind
        assert row["low"] <= row["agreement"] <= row["high"]
        assert (row["p"] < 0.01) == (kind is Brightness), kind
        assert found.value == row["agreement"]
    exact = pliant.analyze(Brightness(), inputs, "pointwise_activation(grids=[8])").rows[0]
    assert exact["agreement"] == exact["low"] == 1 and exact["p"] == 1 / 1001


class Sharp(nn.Module):
    """Decides whether all pixels are black or white."""

    def forward(self, x: Tensor) -> Tensor:
        grey = (x.abs() < 0.9).float()
        return torch.cat([grey, 0.01 + 0 * x], 1).mean((2, 3))


def seams_are_told_from_shuffling() -> None:
    """What only new grey pixels change stays when tiles are shuffled, and goes when blurred."""
    row = pliant.analyze(Sharp(), noise(20, 1, 8, 8).sign(), "pointwise_activation(grids=[4])").rows
    assert row[0]["agreement"] == 1 and row[0]["blurred"] == row[0]["seams"] == 0


def shifting_round_is_told_from_permuting() -> None:
    """Behind a circular convolution nothing but what lies beside what counts."""
    circular = nn.Conv2d(2, 6, 3, padding=1, padding_mode="circular")
    second = nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular")
    layers = (circular, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = seeded(lambda: nn.Sequential(*layers, nn.Linear(6, 3)))
    inputs = noise(40, 2, 4, 4)
    with torch.no_grad():  # decisions that are all alike would stay whatever happens
        model[-1].bias -= model(inputs).median(0).values  # type: ignore[index, operator]
    found = pliant.analyze(model, inputs, "pointwise_activation(grids=[2])")
    first = next(row for row in found.rows if row["what"] == "positions of 0")
    assert first["shifted"] == 1 and first["agreement"] < 0.95
    last = next(row for row in found.rows if row["what"] == "positions of 2")
    assert last["agreement"] == 1  # the mean does not know positions


def saliency_goes_first_where_the_gradient_is_largest() -> None:
    """Of scores that are linear in the inputs the gradient is the weight, everywhere."""
    model = seeded(lambda: nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(32, 3)))
    weight = model[2].weight.detach().view(3, 2, 16)  # type: ignore[index, operator, union-attr]
    inputs = noise(6, 2, 4, 4)
    scores = model(inputs).detach()
    first = weight[scores.argmax(1)].abs().sum(1).argmax(1)
    gone, fill = inputs.flatten(2).clone(), inputs.mean((0, 2, 3))
    gone[torch.arange(6), :, first] = fill
    chance = model(gone.view_as(inputs)).softmax(1)[torch.arange(6), scores.argmax(1)]
    found = pliant.analyze(model, inputs, "pointwise_activation(grids=[2], steps=16)")
    curves = next(one for one in found.figures if one.title == "Deletion")
    assert isinstance(curves, Curves)
    assert abs(curves.lines["saliency"][1][1] - float(chance.mean().detach())) < 1e-6


def the_fewest_positions_are_counted_by_hand() -> None:
    """Sums of two channels: 10 and 8 at two places for the second class, 12 at one for the first.

    With zeros elsewhere, the strongest place alone gives 12 to 10, both give 12 to 18: two are
    needed. With the channels' means in the place of all others, 3/4 and 9/8, none is.
    """
    first, second = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    second[0, 1, 2], second[0, 3, 0], first[0, 1, 2] = 10, 8, 12
    image = torch.stack([torch.cat([first, second])] * 2)
    model = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = pliant.analyze(model, image, 'pointwise_activation(grids=[2], fill="zero")')
    assert found.values["decisions"].tolist() == [1, 1]
    assert found.values["minimal_points"].tolist() == [2, 2] and found.values["points"] == 2 / 16
    assert torch.allclose(found.values["evidence"][0], second[0].double() / 16)
    filled = pliant.analyze(model, image, "pointwise_activation(grids=[2])")
    assert filled.values["minimal_points"].tolist() == [0, 0]


def removals_are_what_running_the_head_gives() -> None:
    from pliant.families.analyze.evidence import filled, insertions, removals

    for model in (on_means(), on_numbers()):
        inputs = noise(3, 2, 4, 4)
        head = find_head(model, inputs)
        phi, _ = maps(model, head, inputs)
        value = phi.double().mean((0, 2, 3))
        order = torch.stack([torch.randperm(16, generator=randomness()) for _ in range(3)])
        steps = removals(head, head.evidence(phi), order, filled(head, value))
        added = insertions(head, head.evidence(phi), order, filled(head, value))
        for taken in (0, 1, 7, 16):
            gone, there = phi.double().flatten(2).clone(), value[:, None].repeat(1, 16)
            there = torch.stack([there] * 3)
            for row in range(3):
                first = order[row, :taken]
                there[row][:, first] = gone[row][:, first]
                gone[row][:, first] = value[:, None]
            for mixed, found in ((gone, steps), (there, added)):
                scores = model[2:](mixed.reshape(phi.shape).float()).detach()
                assert torch.allclose(found[..., taken].float(), scores, atol=1e-5)


def analyzed(spec: str, count: int = 12) -> Finding:
    return pliant.analyze(on_means(), noise(count, 2, 4, 4), f"pointwise_activation({spec})")


def options_do_what_they_say() -> None:
    plain = analyzed("")
    tiles = [row["what"] for row in plain.rows if "blurred" in row]
    assert tiles == ["input in 2 parts", "input in 4 parts"]  # 8 does not divide 4
    assert [r["what"] for r in analyzed("grids=[4]").rows if "blurred" in r] == tiles[1:]
    assert len(analyzed("samples=5").values["decisions"]) == 5
    lines = [found.figures[1].lines["evidence"] for found in (plain, analyzed("steps=3"))]  # type: ignore[union-attr]
    assert [len(line) for line in lines] == [17, 4]  # all of 16 positions, and three steps
    assert (
        lines[1][1][0] == 1 / 3
        and plain.values["deletion"] != analyzed("steps=3").values["deletion"]
    )
    assert analyzed('fill="zero"').values["deletion"] != plain.values["deletion"]
    drawn = analyzed("pictures=3").figures
    assert isinstance(drawn[0], Heat)
    assert len(drawn[0].images) == len(drawn[0].maps) == len(drawn[0].labels) == 3
    assert all(isinstance(one, Curves) for one in analyzed("pictures=0").figures)
    deep = TOYS["plain"]
    found = [
        pliant.analyze(deep.model(), deep.data(), f"pointwise_activation(layers={count})").rows
        for count in (1, 2, 9)
    ]
    named = [[row["what"] for row in rows if "shifted" in row] for rows in found]
    assert [len(names) for names in named] == [1, 2, 4] and named[0] == ["positions of 9"]


def permutations_are_made_as_often_as_asked() -> None:
    original, calls = arrange.shuffle_tiles, [0]

    def counted(*given: Any, **named: Any) -> Tensor:
        calls[0] += 1
        return original(*given, **named)

    arrange.shuffle_tiles = counted
    try:
        analyzed("grids=[2], permutations=1")
        once, calls[0] = calls[0], 0
        analyzed("grids=[2], permutations=3")
    finally:
        arrange.shuffle_tiles = original
    assert calls[0] == 3 * once


def what_cannot_be_looked_at_is_refused() -> None:
    inputs = noise(8, 2, 4, 4)
    tall = nn.Sequential(nn.Conv2d(2, 6, 4), nn.Flatten(), nn.Linear(6, 3))
    hidden = net(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    behind = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    nested = net(nn.AdaptiveAvgPool2d(1), nn.Flatten(), behind)
    chances = net(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3), nn.Softmax(1))

    class Added(nn.Module):
        """Adds something behind the pooling."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.more = on_means(), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.net(x) + self.more(x.flatten(1)).relu()
            return found

    for model, data, options, words in (
        (tall, inputs, "grids=[2]", "affine function of a last map"),
        (hidden, inputs, "grids=[2]", "affine function of a last map"),
        (nested, inputs, "grids=[2]", "affine function of a last map"),
        (seeded(Added), inputs, "grids=[2]", "affine function of a last map"),
        (chances, inputs, "grids=[2]", "before the softmax"),
        (on_means(), inputs, "grids=[3, 5]", "cannot be cut evenly into 3, 5 parts"),
        (on_means(), inputs[:1], "grids=[2]", "At least 2 inputs"),
        (on_means(), inputs.long(), "grids=[2]", "of real numbers, but torch.int64"),
        (on_means(), [(inputs, inputs, None)], "grids=[2]", "in one tensor"),
        (on_means(), inputs, "grids=[1]", "grids must be 2 or more"),
        (on_means(), inputs, "permutations=51", "permutations 1 to 50"),
    ):
        try:
            pliant.analyze(model, data, f"pointwise_activation({options})")
        except PliantError as refusal:
            assert words in str(refusal), refusal
        else:
            raise AssertionError(words)


AFFINE = "affine function of a last map"

CASES = [
    Case(
        "pointwise_activation",
        "pointwise_activation(permutations=2, layers=2)",
        variants=(
            'pointwise_activation(fill="zero", grids=[3], steps=2)',
            "pointwise_activation(samples=4, pictures=0, permutations=1)",
        ),
        refuses={"bare": AFFINE, "linear": "in one tensor", "transformer": AFFINE},
        own=(
            evidence_and_bias_are_the_scores,
            the_evidence_of_a_position_is_its_share_of_the_mean,
            only_heads_on_means_ignore_the_order_of_positions,
            shuffling_speaks_for_and_against,
            seams_are_told_from_shuffling,
            shifting_round_is_told_from_permuting,
            saliency_goes_first_where_the_gradient_is_largest,
            the_fewest_positions_are_counted_by_hand,
            removals_are_what_running_the_head_gives,
            options_do_what_they_say,
            permutations_are_made_as_often_as_asked,
            what_cannot_be_looked_at_is_refused,
        ),
    )
]
