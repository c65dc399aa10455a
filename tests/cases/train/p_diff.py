"""P-DIFF: the histogram of margins, the ramp, the estimate of the noise, and who is left out."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from pliant.data import Data, Train
from pliant.data.noise import noisy_labels
from pliant.drivers.loop import fit
from pliant.errors import DataError
from pliant.math.margins import BINS, HIGH, LOW, WIDTH, MarginHistogram, bins_of, margins
from pliant.method import Method
from pliant.methods.train.p_diff import PDiff
from pliant.run import Run, start
from pliant.testing import Case

EDGES = np.concatenate([LOW + WIDTH * np.arange(BINS + 1), [np.inf]])


def noise(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random)


def margins_are_those_of_the_definition() -> None:
    scores, labels = 3 * noise(50, 6), torch.arange(50) % 6
    shares = scores.softmax(1).numpy()
    wanted = []
    for row, label in zip(shares, labels.tolist(), strict=True):
        wanted.append(row[label] - np.delete(row, label).max())
    assert np.allclose(margins(scores, labels), wanted, atol=1e-6)
    maps, places = scores.view(5, 10, 6).movedim(2, 1), labels.view(5, 10)
    assert torch.allclose(margins(maps, places).flatten(), margins(scores, labels), atol=1e-6)


def the_histogram_is_that_of_the_last_batches() -> None:
    """As numpy counts them anew; the oldest batch leaves, the shares rise to 1."""
    histogram, kept = MarginHistogram(window=4), list[Tensor]()
    for number in range(11):
        found = noise(30 + number, seed=number).tanh() * 1.2  # some lie outside of all bins
        histogram.update(found)
        kept = [*kept, found][-4:]
        values = torch.cat(kept).clamp(LOW, HIGH).numpy().astype(np.float64)
        wanted = np.histogram(values + 1e-7, EDGES)[0]
        assert np.array_equal(histogram.counts.sum(0), wanted)
        assert histogram.full == (number >= 3)
    shares = histogram.cdf()
    assert shares[-1] == 1 and (shares.diff() >= 0).all()
    for share in (0.0, 0.2, 0.77):
        kept_share = float((bins_of(torch.cat(kept)) >= histogram.threshold(share)).double().mean())
        widest = float(histogram.counts.sum(0).max() / histogram.counts.sum())
        assert 1 - share <= kept_share <= 1 - share + widest
    assert histogram.threshold(1.0) == BINS + 1
    middle = torch.cat(kept).clamp(LOW, HIGH).abs().mean()
    assert histogram.confidence() == pytest.approx(float(middle), abs=0.01)


def zero_lies_in_one_bin() -> None:
    exact = torch.tensor([0.0, -0.0, 1e-9, -1.0, 1.0, 0.01])
    assert bins_of(exact).tolist() == [110, 110, 110, 10, 210, 111]
    assert bins_of(exact.double()).tolist() == [110, 110, 110, 10, 210, 111]


def begun(method: Method, steps: int = 100) -> Run:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = SGD(model.parameters(), 0.1)
    return start(model, method, example=(noise(1, 4),), optimizer=optimizer, steps=steps)


def shown(run: Run, wanted: Tensor, steps: int = 1) -> Any:
    """Let samples of these margins go by, in as many batches; return the last weights."""
    share = (1 + wanted.clamp(-0.999, 0.999)) / 2  # of two classes
    scores = torch.stack([share.log(), (1 - share).log()], 1)
    labels, weights = torch.zeros(len(wanted), dtype=torch.long), None
    for _ in range(steps):
        losses = F.cross_entropy(scores, labels, reduction="none")
        weights = run.method.weigh(run, losses, scores, (None, labels))
        run.after_step()
    return weights


def known_noise_is_ramped_in() -> None:
    """Nothing before the histogram is full, then a share that grows to the rate and stays there."""
    run, shares = begun(PDiff(0.4, ramp=0.5, window=5)), []
    for number in range(100):
        weights = shown(run, noise(200, seed=number).tanh())
        shares.append(1.0 if weights is None else float(weights.mean()))
        if number == 24:
            assert run.state["rate"] == pytest.approx(0.4 * 0.48)
    assert shares[:4] == [1.0] * 4
    assert 1 - np.mean(shares[60:]) == pytest.approx(0.4, abs=0.02)
    assert 1 - np.mean(shares[20:30]) == pytest.approx(0.2, abs=0.03)


def mixture(low: float, seed: int, spread: float = 0.1) -> Tensor:
    """A share of margins about -0.7, the others about 0.7."""
    sides = torch.where(torch.arange(500) < round(500 * low), -0.7, 0.7)
    return sides + spread * noise(500, seed=seed)


def unknown_noise_is_read_off_and_then_frozen() -> None:
    """30 % about -0.7: so many are left out; once margins are far from 0, the rate stays."""
    run = begun(PDiff(ramp=0.2, window=5))
    for number in range(40):
        shown(run, mixture(0.3, number))
    assert run.state["rate"] == pytest.approx(0.3, abs=0.02)
    assert float(shown(run, mixture(0.3, 99)).mean()) == pytest.approx(0.7, abs=0.02)
    for low in (0.1, 0.5):  # not yet sure: the rate follows
        for number in range(6):
            shown(run, mixture(low, number))
        assert run.state["rate"] == pytest.approx(low, abs=0.02)
    sure = begun(PDiff(ramp=0.2, window=5, sure=0.6))
    for number in range(20):
        shown(sure, mixture(0.3, number))
    frozen = sure.state["rate"]
    for number in range(20):
        shown(sure, mixture(0.05, number))
    assert frozen > 0 and sure.state["rate"] == frozen


class Nothing(Method):
    """Does nothing."""


def no_noise_is_plain_training_to_the_last_bit() -> None:
    inputs, labels = noise(32, 4), torch.arange(32) % 2
    ended = []
    for method in (PDiff(0.0, window=1), Nothing()):
        run = begun(method, steps=8)
        fit(run, Data((inputs, labels)), Train(epochs=2, batch=8, lr=0.1, device="cpu"))
        ended.append(run.model.state_dict())
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])


def weights_have_options_and_one_sample_always_counts() -> None:
    margin = torch.tensor([-0.9, -0.5, 0.2, 0.8])
    assert shown(begun(PDiff(0.5, ramp=0, window=1)), margin).tolist() == [0, 0, 1, 1]
    kept = shown(begun(PDiff(0.5, ramp=0, window=1, normalize="kept")), margin)
    assert kept.tolist() == [0, 0, 2, 2]
    soft = shown(begun(PDiff(0.5, ramp=0, window=1, softness=0.1)), margin)
    assert torch.allclose(soft, torch.sigmoid((margin - 0.2) / 0.1), atol=0.05)
    assert shown(begun(PDiff(1.0, ramp=0, window=1)), margin).tolist() == [0, 0, 0, 1]
    run = begun(PDiff(0.5, ramp=0, window=1))
    scores, labels = noise(4, 2), torch.tensor([0, -100, 1, -100])
    losses = F.cross_entropy(scores, labels, reduction="none")
    weights = run.method.weigh(run, losses, scores, (None, labels))
    assert weights is not None and weights[[1, 3]].tolist() == [0, 0] and weights.sum() == 1
    assert int(run.state["counts"].sum()) == 2
    none = torch.full((4,), -100)
    assert run.method.weigh(run, torch.zeros(4), scores, (None, none)) is None


def what_has_no_classes_is_refused() -> None:
    run = begun(PDiff())
    for scores, labels in (
        (noise(4, 1), torch.zeros(4, dtype=torch.long)),
        (noise(4, 2), noise(4)),
        (noise(4, 2), None),
    ):
        with pytest.raises(DataError, match="two classes or more"):
            run.method.weigh(run, torch.zeros(4), scores, (None, labels))


def a_training_too_short_for_the_histogram_says_so() -> None:
    run = begun(PDiff(window=50))
    shown(run, noise(8).tanh(), steps=3)
    with pytest.warns(UserWarning, match="hold 50 batches, but the training had 3"):
        run.finish(strict=False)


def noise_has_its_rate_and_kind() -> None:
    labels = torch.arange(6000) % 3
    for kind in ("symmetric", "pair"):
        wrong = noisy_labels(labels, 0.4, 3, kind, seed=1)
        assert float((wrong != labels).double().mean()) == pytest.approx(0.4, abs=0.02)
        moved = (wrong - labels) % 3
        share = float((moved == 2).double().mean())
        assert share == pytest.approx(0.2 if kind == "symmetric" else 0.0, abs=0.02)
    assert torch.equal(noisy_labels(labels, 0.0, 3), labels)


def wrong_labels_are_left_out() -> None:
    """Three clouds, 40 % of the labels wrong: those kept are right far more often than 60 %."""
    torch.manual_seed(0)
    clean = torch.arange(600) % 3
    inputs = noise(600, 3) + 3 * F.one_hot(clean, 3)
    labels = noisy_labels(clean, 0.4, 3)
    model = nn.Linear(3, 3)
    optimizer = SGD(model.parameters(), 0.1)
    run = start(model, PDiff(0.4, window=5), example=(inputs[:1],), optimizer=optimizer, steps=200)
    weights: Any = None
    for _ in range(run.steps):
        output = model(inputs)
        losses = F.cross_entropy(output, labels, reduction="none")
        weights = run.method.weigh(run, losses.detach(), output, (inputs, labels))
        optimizer.zero_grad()
        run.loss(losses, output, (inputs, labels)).backward()
        run.before_step()
        optimizer.step()
        run.after_step()
    kept = weights > 0
    assert float((labels == clean)[kept].double().mean()) > 0.9
    assert float(kept.double().mean()) == pytest.approx(0.6, abs=0.03)


CASES = [
    Case(
        "p_diff",
        spec="p_diff(noise=0.3, window=2, ramp=0.3)",
        variants=("p_diff(window=2, softness=0.1, normalize='kept')",),
        own=(
            margins_are_those_of_the_definition,
            the_histogram_is_that_of_the_last_batches,
            zero_lies_in_one_bin,
            known_noise_is_ramped_in,
            unknown_noise_is_read_off_and_then_frozen,
            no_noise_is_plain_training_to_the_last_bit,
            weights_have_options_and_one_sample_always_counts,
            what_has_no_classes_is_refused,
            a_training_too_short_for_the_histogram_says_so,
            noise_has_its_rate_and_kind,
            wrong_labels_are_left_out,
        ),
    )
]
