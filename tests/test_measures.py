"""Metrics agree with known libraries and with values worked out by hand, however data are cut."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.data import Metric, measures
from pliant.data.ready import regression, segmentation, super_resolution, task_of
from pliant.errors import DataError, MethodError


def value(metric: Metric, output: Tensor, labels: Tensor, batch: int = 3) -> float:
    """Score batch by batch."""
    parts = zip(output.split(batch), labels.split(batch), strict=True)
    rows = [metric.rows(mine, (None, other), len(mine)) for mine, other in parts]
    return metric.value(torch.cat(rows))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- segmentation


def test_the_mean_iou_is_that_of_the_whole_split_by_hand() -> None:
    """Two images of four pixels; class 2 occurs nowhere, one pixel is void.

    Class 0: in both 2, in either 4; class 1: 3 and 5: (2/4 + 3/5) / 2.
    """
    found = torch.tensor([[[0, 0], [1, 1]], [[0, 1], [1, 1]]])
    wanted = torch.tensor([[[0, 1], [1, 1]], [[0, 0], [1, 255]]])
    task = segmentation()
    scores = F.one_hot(found, 3).movedim(-1, 1).float()
    for batch in (1, 2):
        assert value(task.metrics["mIoU"], scores, wanted, batch) == pytest.approx(0.55)
        assert value(task.metrics["accuracy"], scores, wanted, batch) == pytest.approx(5 / 7)


@pytest.mark.parametrize("void", [255, -1, -100, 7])
def test_the_mean_iou_is_torchmetrics(void: int) -> None:
    classification = pytest.importorskip("torchmetrics.classification")
    scores, labels = noise(10, 6, 9, 7), (noise(10, 9, 7, seed=1) * 5).long()
    labels[:, :2] = void
    labels[scores[:, 0] < 0.3] = void
    known = classification.MulticlassJaccardIndex(6, average="macro", ignore_index=void)
    task = segmentation(void=7 if void == 7 else None)
    found = value(task.metrics["mIoU"], scores, labels)
    assert found == pytest.approx(float(known(scores, labels)), abs=1e-6)
    micro = classification.MulticlassAccuracy(6, average="micro", ignore_index=void)
    wanted = float(micro(scores, labels))
    assert value(task.metrics["accuracy"], scores, labels) == pytest.approx(wanted, abs=1e-6)
    loss = F.cross_entropy(scores, labels, ignore_index=void)
    assert float(task.total(scores, (None, labels))) == pytest.approx(float(loss), abs=1e-6)


def test_coarse_scores_are_interpolated_as_transformers_does() -> None:
    scores, labels = noise(2, 4, 3, 3), (noise(2, 12, 12, seed=1) * 4).long()
    big = F.interpolate(scores, size=(12, 12), mode="bilinear", align_corners=False)
    task = segmentation()
    assert torch.equal(
        task.total(scores, (None, labels)), task.total(big, (None, labels.unsqueeze(1)))
    )


def test_a_map_without_any_label_costs_nothing_and_counts_nowhere() -> None:
    scores = noise(2, 3, 4, 4).requires_grad_()
    labels = torch.full((2, 4, 4), 255)
    loss = segmentation().total(scores, (None, labels))
    loss.backward()
    assert float(loss.detach()) == 0 and scores.grad is not None and not scores.grad.any()


# ---------------------------------------------------------------- images


def psnr_of(**options: object) -> Metric:
    text = ", ".join(f"{name}={given!r}" for name, given in options.items())
    task = task_of(f"super-resolution({text})")
    assert task is not None
    return task.metrics["PSNR"]


def test_psnr_by_hand() -> None:
    """An error of a tenth everywhere is 20 dB; of 25.5 of 255 as well."""
    wanted = torch.full((2, 1, 12, 12), 0.5)
    assert value(psnr_of(), wanted + 0.1, wanted) == pytest.approx(20.0, abs=1e-5)
    whole = 255 * wanted
    assert value(psnr_of(peak=255), whole + 25.5, whole) == pytest.approx(20.0, abs=1e-5)
    assert value(psnr_of(), wanted, wanted) == pytest.approx(100.0)
    assert value(psnr_of(), wanted + 9, wanted) == pytest.approx(-10 * math.log10(0.25), abs=1e-5)


@pytest.mark.parametrize("border", [0, 3])
def test_psnr_and_ssim_of_the_brightness_are_skimages(border: int) -> None:
    color = pytest.importorskip("skimage.color")
    known = pytest.importorskip("skimage.metrics")
    wanted = F.interpolate(noise(4, 3, 6, 6), size=24, mode="bicubic").clamp(0, 1)
    given = (wanted + 0.1 * noise(4, 3, 24, 24, seed=1)).clamp(0, 1)
    task = super_resolution(border=border)
    cut = slice(border, 24 - border)
    pairs = [
        [color.rgb2ycbcr(image.movedim(0, -1).numpy())[cut, cut, 0] for image in pair]
        for pair in zip(wanted.double(), given.double(), strict=True)
    ]
    decibels = [known.peak_signal_noise_ratio(a, b, data_range=255) for a, b in pairs]
    assert value(task.metrics["PSNR"], given, wanted) == pytest.approx(np.mean(decibels), abs=1e-4)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    alike = [known.structural_similarity(a, b, data_range=255, **options) for a, b in pairs]
    assert value(task.metrics["SSIM"], given, wanted) == pytest.approx(np.mean(alike), abs=1e-6)


def test_psnr_and_ssim_of_all_channels_are_torchmetrics() -> None:
    image = pytest.importorskip("torchmetrics.functional.image")
    given, wanted = noise(3, 3, 16, 20), noise(3, 3, 16, 20, seed=1)
    task = super_resolution(luma=False)
    each = image.peak_signal_noise_ratio(
        given, wanted, data_range=1.0, reduction="none", dim=(1, 2, 3)
    )
    assert value(task.metrics["PSNR"], given, wanted) == pytest.approx(float(each.mean()), abs=1e-4)
    known = pytest.importorskip("skimage.metrics").structural_similarity
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = zip(given.double().numpy(), wanted.double().numpy(), strict=True)
    alike = np.mean([known(a, b, channel_axis=0, data_range=1.0, **options) for a, b in pairs])
    assert value(task.metrics["SSIM"], given, wanted) == pytest.approx(float(alike), abs=1e-6)


def test_images_that_cannot_be_compared_are_refused() -> None:
    wanted = 255 * noise(2, 3, 12, 12)
    with pytest.raises(DataError, match="peak=255"):
        value(psnr_of(), wanted, wanted)
    with pytest.raises(DataError, match="undo a normalization"):
        value(psnr_of(), wanted / 255 - 0.5, wanted / 255 - 0.5)
    with pytest.raises(DataError, match="smaller border"):
        value(psnr_of(border=6), wanted / 255, wanted / 255)
    with pytest.raises(DataError, match="at least 11 x 11"):
        measures.ssim(wanted[..., :10], wanted[..., :10], 255)


# ---------------------------------------------------------------- numbers, yes and no, tokens


@pytest.mark.parametrize("shape", [(50,), (50, 1), (50, 4), (50, 3, 6, 5)])
def test_r2_and_rmse_are_sklearns(shape: tuple[int, ...]) -> None:
    known = pytest.importorskip("sklearn.metrics")
    wanted = noise(*shape) + 100 * torch.arange(shape[1] if shape[1:] else 1).view(
        -1, *[1] * max(0, len(shape) - 2)
    ).squeeze(0 if len(shape) == 1 else ())
    given = wanted + 0.2 * noise(*shape, seed=1)
    tall = [
        each.double().reshape(50, shape[1] if shape[1:] else 1, -1).movedim(1, -1).flatten(0, 1)
        for each in (wanted, given)
    ]
    task = regression()
    r2 = known.r2_score(*tall, multioutput="variance_weighted")
    assert value(task.metrics["R2"], given, wanted) == pytest.approx(r2, abs=1e-4)
    rmse = math.sqrt(known.mean_squared_error(*tall))
    assert value(task.metrics["RMSE"], given, wanted) == pytest.approx(rmse, abs=1e-4)


def test_targets_that_are_nan_have_no_label() -> None:
    wanted = torch.tensor([[1.0], [3.0], [math.nan], [5.0]])
    given = torch.tensor([[2.0], [3.0], [9.0], [5.0]]).requires_grad_()
    task = regression()
    loss = task.total(given, (None, wanted))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1 / 3) and torch.isfinite(given.grad).all()  # type: ignore[arg-type]
    assert value(task.metrics["R2"], given.detach(), wanted) == pytest.approx(1 - 1 / 8)


def test_f1_and_accuracy_of_labels_are_sklearns() -> None:
    known = pytest.importorskip("sklearn.metrics")
    logits, labels = noise(40, 6) - 0.4, (noise(40, 6, seed=1) < 0.3).long()
    task = task_of("multi-label")
    assert task is not None and task.main == "F1"
    f1 = known.f1_score(labels, logits > 0, average="micro")
    assert value(task.metrics["F1"], logits, labels) == pytest.approx(f1)
    right = float(((logits > 0) == labels).float().mean())
    assert value(task.metrics["accuracy"], logits, labels) == pytest.approx(right)
    loss = F.binary_cross_entropy_with_logits(logits, labels.float())
    assert torch.allclose(task.total(logits, (None, labels)), loss)


def test_the_next_token_is_the_one_behind() -> None:
    tokens = torch.tensor([[0, 1, 2, 0], [1, 2, 0, 1]])
    scores = F.one_hot((tokens + 1) % 3, 3).float() * 50
    task = task_of("next-token")
    assert task is not None
    batch = {"input_ids": tokens, "labels": tokens}
    metric = task.metrics["accuracy"]
    assert metric.value(metric.rows(scores, batch, 2)) == 1
    assert float(task.total(scores, batch)) < 1e-6
    flat = torch.zeros_like(scores)
    metric = task.metrics["perplexity"]
    assert metric.value(metric.rows(flat, batch, 2)) == pytest.approx(3.0)
    assert task.total(flat, batch, "none").shape == (2, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    scores[0, 1:] = 0  # what it would say behind the mask
    assert float(task.total(scores, {**batch, "attention_mask": mask})) < 1e-6


# ---------------------------------------------------------------- metrics of one's own


def test_numbers_of_batches_are_weighed_by_their_samples() -> None:
    metric = Metric(lambda output, batch: output.mean(), "higher")
    assert value(metric, torch.arange(7.0), torch.zeros(7)) == pytest.approx(3.0)
    each = Metric(lambda output, batch: output, "higher")
    assert value(each, torch.arange(7.0), torch.zeros(7)) == pytest.approx(3.0)


def test_a_value_without_one_row_is_that_of_the_others() -> None:
    scores, labels = noise(6, 4, 5, 5), (noise(6, 5, 5, seed=1) * 4).long()
    others = torch.arange(6) != 2
    for metric in (
        *segmentation().metrics.values(),
        Metric(lambda o, b: o.sum((1, 2, 3)), "lower"),
    ):
        rows = metric.rows(scores, (None, labels), 6)
        assert float(metric.without_one(rows)[2]) == pytest.approx(metric.value(rows[others]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda output, batch: 0, "which way is better"),
        ((lambda output, batch: 0, "up"), "which way is better"),
        (("mean", "higher"), "function of"),
    ],
)
def test_a_metric_says_which_way_is_better(given: object, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        task_of(metrics={"mine": given})


def test_a_metric_gives_numbers() -> None:
    with pytest.raises(MethodError, match="a number for each"):
        Metric(lambda output, batch: output, "higher").rows(torch.ones(2, 3), None, 2)
