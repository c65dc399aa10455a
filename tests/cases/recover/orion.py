"""ORION: the features of pixels by their identity, planted models, every option by its effect."""

import itertools
import sys
from unittest.mock import patch

import numpy as np
import tensorly
import torch
from tensorly.metrics.factors import congruence_coefficient
from torch import Tensor

import pliant
from pliant.errors import PliantError
from pliant.families.solve.cp import CP, normalized, pixel_features, rebuilt
from pliant.methods.recover.orion import Orion
from pliant.result import Solution
from pliant.testing import Case

OWN = "orion"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(*shape: int, seed: int = 0) -> Tensor:
    return noise(*shape, seed=seed).abs()


def planted(rank: int = 5, seed: int = 0, make: object = noise) -> tuple[Tensor, list[Tensor]]:
    """A cube (20, 18, 12) of this rank, and its factors."""
    factors = [make(n, rank, seed=10 * seed + k) for k, n in enumerate((20, 18, 12))]  # type: ignore[operator]
    return torch.einsum("ir,jr,kr->ijk", *factors), factors


def model_of(found: Solution) -> CP:
    names = ("rows", "columns", "bands")
    return CP(found.values["weights"], tuple(found.values[n] for n in names))  # type: ignore[arg-type]


def fitted(x: Tensor, known: Tensor | None = None, seed: int = 0, **options: object) -> Solution:
    return pliant.recover(x, known, pliant.registry.construct(OWN, options), seed=seed)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# ------------------------------------------------------------------ features


def spectra_are_linear_in_features() -> None:
    """unfold(cube, 2) = C diag(w) F^T, the cube by TensorLy and F of all pixels in C order."""
    model = CP(positive(7), (noise(6, 7), noise(5, 7, seed=1), noise(4, 7, seed=2)))
    with tensorly.backend_context("pytorch"):
        cube = tensorly.cp_to_tensor((model.weights, list(model.factors)))
        unfolded = tensorly.unfold(cube, 2)
    places = torch.arange(30)
    features = pixel_features(model, places // 5, places % 5)
    assert error(model.factors[2] @ torch.diag(model.weights) @ features.T, unfolded) < 1e-10
    assert error(rebuilt(model.weights, model.factors), cube) < 1e-10
    strong = pixel_features(model, places // 5, places % 5, "w")
    root = pixel_features(model, places // 5, places % 5, "sqrt")
    assert torch.allclose(strong, features * model.weights)
    assert torch.allclose(root * root, features * strong)


def signs_and_lengths_are_fixed() -> None:
    """A model with other signs and lengths is the same model, its weights never negative."""
    factors = [noise(n, 4, seed=n) for n in (6, 5, 7)]
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0]).double()
    first = normalized(factors)
    second = normalized([factors[0] * 3 * signs, factors[1], factors[2] * signs / 3])
    for one, other in zip(first[1], second[1], strict=True):
        assert torch.allclose(one, other) and torch.allclose(
            one.norm(dim=0), torch.ones(4).double()
        )
    assert torch.allclose(first[0], second[0]) and (first[0] > 0).all()
    cube = torch.einsum("ir,jr,kr->ijk", *factors)
    assert error(rebuilt(*first), cube) < 1e-12


# ------------------------------------------------------------------ planted models


def planted_models_come_back() -> None:
    for seed in range(3):
        cube, factors = planted(seed=seed)
        found = fitted(cube, rank=5, start="svd", tolerance=1e-12, iterations=500)
        values = found.values
        assert (
            error(rebuilt(values["weights"], model_of(found).factors) * values["scale"], cube)
            < 1e-6
        )
        for name, factor in zip(("rows", "columns", "bands"), factors, strict=True):
            match = congruence_coefficient(
                values[name].numpy(), factor.numpy(), absolute_value=True
            )
            assert match[0] > 0.999
        assert found.converged and found.history[-1]["error"] < 1e-6


def missing_entries_are_filled_in() -> None:
    cube, _ = planted(rank=3)
    known = torch.rand(cube.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    options = {"rank": 3, "start": "svd", "iterations": 400, "tolerance": 1e-10}
    found = fitted(torch.where(known, cube, torch.nan), known, **options)
    assert error(found.value, cube) < 1e-3 and torch.equal(found.value[known], cube[known])


def other_cubes_get_codes_in_the_same_components() -> None:
    """With C fixed, a cube of other pixels but the same bands is rebuilt by its own factors."""
    cube, factors = planted(rank=4)
    method = Orion(rank=4, start="svd", tolerance=1e-12, iterations=500)
    found = pliant.recover(cube, None, method)
    other = torch.einsum("ir,jr,kr->ijk", noise(9, 4, seed=7), noise(8, 4, seed=8), factors[2])
    codes = method.project(other, found.values, torch.Generator().manual_seed(0))
    assert torch.equal(codes.factors[2], found.values["bands"])
    assert torch.equal(codes.weights, found.values["weights"])
    scale = found.values["scale"]
    assert error(rebuilt(codes.weights, codes.factors) * scale, other) < 1e-3
    places = torch.arange(72)
    features = pixel_features(codes, places // 8, places % 8)
    spectra = features @ torch.diag(codes.weights) @ codes.factors[2].T
    assert error(spectra * scale, other.reshape(72, -1)) < 1e-3


# ------------------------------------------------------------------ options


def the_rank_is_that_of_the_model() -> None:
    cube, _ = planted()
    for rank in (2, 7):
        found = fitted(cube, rank=rank, iterations=3)
        assert found.values["weights"].shape == (rank,) and found.values["bands"].shape == (
            12,
            rank,
        )


def decompositions_differ_as_they_say() -> None:
    cube, _ = planted(rank=4, make=positive)
    found = {
        kind: fitted(cube, rank=4, decomposition=kind, iterations=100, tolerance=1e-9)
        for kind in ("cp", "nncp", "cp_rand")
    }
    assert all(error(one.value, cube) < 0.02 for one in found.values())
    names = ("rows", "columns", "bands")
    assert min(float(found["nncp"].values[name].min()) for name in names) >= 0
    values = [one.value for one in found.values()]
    assert all((a - b).abs().max() > 1e-9 for a, b in itertools.combinations(values, 2))
    mixed, _ = planted(rank=4)  # of both signs
    assert min(float(fitted(mixed, rank=4).values[name].min()) for name in names) < 0


def scaling_is_by_the_largest_entry_or_by_bands() -> None:
    cube, _ = planted(make=positive)
    cube = cube * torch.arange(1, 13) + 3
    found = fitted(cube, rank=3, iterations=3)
    assert torch.equal(found.values["offset"], torch.zeros(12).double())
    assert torch.equal(found.values["scale"], cube.max().expand(12))
    found = fitted(cube, rank=3, scaling="bands", iterations=60)
    assert torch.equal(found.values["offset"], cube.amin((0, 1)))
    assert torch.allclose(found.values["scale"], cube.amax((0, 1)) - cube.amin((0, 1)))
    model = rebuilt(found.values["weights"], model_of(found).factors)
    assert torch.allclose(found.value, model * found.values["scale"] + found.values["offset"])
    known = torch.ones_like(cube, dtype=torch.bool)
    known[0, 0] = False
    hidden = torch.where(known, cube, 1e6)  # what is unknown has no part in the scale
    found = fitted(hidden, known, rank=3, scaling="bands", iterations=3)
    assert float((found.values["offset"] + found.values["scale"]).max()) <= float(cube.max())


def singular_vectors_are_a_better_start() -> None:
    cube, _ = planted()
    options = {"rank": 5, "iterations": 4}
    first, second = (fitted(cube, start=start, **options) for start in ("random", "svd"))
    assert second.history[-1]["error"] < 0.3 * first.history[-1]["error"]
    wide = fitted(cube, rank=30, start="svd", iterations=2)  # more than any side: filled at random
    again = fitted(cube, rank=30, start="svd", iterations=2, seed=1)
    assert wide.values["rows"].shape == (20, 30)
    assert (wide.value - again.value).abs().max() > 1e-6


def a_ridge_holds_factors_down() -> None:
    cube, _ = planted()
    sizes = [
        float(fitted(cube, rank=5, ridge=ridge, start="svd").value.norm()) / float(cube.norm())
        for ridge in (1e-9, 0.1, 1.0)
    ]
    assert sizes[0] > 0.9999 and sizes[0] - 1e-3 > sizes[1] > sizes[2] + 0.01
    single = torch.zeros(4, 3, 5).double()
    single[0, 0, 0] = 1.0
    refused("singular", lambda: fitted(single, rank=2, ridge=0.0))


def bands_may_lie_along_any_axis() -> None:
    cube, _ = planted()
    options = {"rank": 5, "iterations": 20}
    first = fitted(cube, **options)
    moved = fitted(cube.movedim(2, 0), axis=0, **options)
    assert torch.allclose(moved.value.movedim(0, 2), first.value)
    assert torch.allclose(moved.values["bands"], first.values["bands"])


def it_stops_where_it_is_told() -> None:
    cube, _ = planted()
    short = fitted(cube, rank=5, iterations=4)
    assert short.iterations == len(short.history) == 4 and not short.converged
    loose, tight = (fitted(cube, rank=5, start="svd", tolerance=t) for t in (1e-2, 1e-7))
    assert loose.converged and tight.converged and loose.iterations < tight.iterations
    errors = [row["error"] for row in loose.history]
    assert errors[-2] - errors[-1] < 1e-2


def what_has_no_features_is_refused() -> None:
    cube, _ = planted()
    known = torch.ones_like(cube, dtype=torch.bool)
    for words, call in (
        ("take", lambda: fitted(cube[0])),
        ("nothing but", lambda: fitted(0 * cube, rank=3)),
        ("nothing but", lambda: fitted(0 * cube + 1, rank=3, scaling="bands")),
        ("rank must lie in 1..216", lambda: fitted(cube)),
        ("rank must be int", lambda: fitted(cube, rank=0)),
        ("ridge must be float in 0..1", lambda: fitted(cube, rank=3, ridge=-1.0)),
        ("iterations must be int", lambda: fitted(cube, rank=3, iterations=0)),
        ("without negative numbers", lambda: fitted(cube, rank=3, decomposition="nncp")),
        ("cannot leave entries out", lambda: fitted(cube, known, rank=3, decomposition="cp_rand")),
        ("12 bands", lambda: Orion().project(cube[..., 1:], _small().values, torch.Generator())),
        ("finite", lambda: Orion().project(cube / 0, _small().values, torch.Generator())),
        ("weight", lambda: pixel_features(model_of(_small()), *torch.zeros(2, 1).long(), "no")),
    ):
        refused(words, call)


def without_tensorly_it_says_what_to_install() -> None:
    with patch.dict(sys.modules, {"tensorly": None}):
        refused('pip install "pliant[recover]"', _small)


def _small() -> Solution:
    return fitted(planted()[0], rank=3, iterations=2)


def refused(words: str, call: object) -> None:
    try:
        call()  # type: ignore[operator]
    except PliantError as refusal:
        assert words in str(refusal), refusal
    else:
        raise AssertionError(f"{words!r} was not said")


# ------------------------------------------------------------------ scikit-learn


def the_transformer_gives_the_features_of_all_pixels() -> None:
    from sklearn.base import clone

    from pliant.api.estimator import CubeFeatures

    cube, _ = planted(rank=4)
    model = clone(CubeFeatures("orion(rank=6, iterations=30)", weight="w", random_state=0))
    features = model.fit_transform(cube.numpy())
    assert features.shape == (360, 6) and len(model.get_feature_names_out()) == 6
    assert np.array_equal(features, model.transform())
    spectra = features @ model.factors_[2].T  # weights are in the features
    assert (
        error(torch.as_tensor(spectra * model.solution_.values["scale"][0]), cube.reshape(360, 12))
        < 0.2
    )
    rows, columns = np.array([3, 19]), np.array([4, 17])
    assert np.allclose(model.pixel_features(rows, columns), features[rows * 18 + columns])
    assert model.fit_error_ == model.solution_.history[-1]["error"]
    other = model.transform(cube.numpy()[:7, :5])
    assert other.shape == (35, 6) and np.array_equal(other, model.transform(cube.numpy()[:7, :5]))
    plain = CubeFeatures("orion(rank=6, iterations=30)", random_state=0).fit_transform(cube.numpy())
    assert np.allclose(plain * model.weights_, features)
    refused("gives no factors", lambda: CubeFeatures("nonconvex_tsvd").fit(cube.numpy()))


def the_classifier_learns_from_labelled_pixels_only() -> None:
    from pliant.api.estimator import CubeClassifier

    labels = np.repeat([[1, 2, 3]], 6, 1).repeat(18, 0)  # three stripes of six columns
    spectra = positive(4, 12).numpy()
    random = np.random.default_rng(0)
    cube = spectra[labels] + 0.05 * random.standard_normal((18, 18, 12))
    known = np.where(random.random(labels.shape) < 0.3, labels, 0)
    model = CubeClassifier("orion(rank=20, iterations=20)", random_state=0).fit(cube, known)
    assert list(model.classes_) == [1, 2, 3] and model.predict().shape == labels.shape
    assert (model.predict() == labels).mean() > 0.98
    assert model.score(cube, labels) > 0.98 and model.predict(cube[:9]).shape == (9, 18)
    path = model.rank_path(cube, known, labels, (2, 20))
    assert list(path) == [2, 20] and path[20] > 0.98 and 0 < path[2] <= 1
    for words, wrong in (
        ("shape (18, 18)", known[1:]),
        ("whole numbers", known + 0.5),
        ("two classes", np.where(known == 1, 1, 0)),
    ):
        refused(words, lambda wrong=wrong: CubeClassifier("orion(rank=3)").fit(cube, wrong))


CASES = [
    Case(
        OWN,
        spec="orion(rank=6)",
        variants=(
            'orion(rank=6, decomposition="cp", start="svd", axis=0, ridge=1e-6)',
            'orion(rank=30, scaling="bands", ridge=1e-3)',
        ),
        own=(
            spectra_are_linear_in_features,
            signs_and_lengths_are_fixed,
            planted_models_come_back,
            missing_entries_are_filled_in,
            other_cubes_get_codes_in_the_same_components,
            the_rank_is_that_of_the_model,
            decompositions_differ_as_they_say,
            scaling_is_by_the_largest_entry_or_by_bands,
            singular_vectors_are_a_better_start,
            a_ridge_holds_factors_down,
            bands_may_lie_along_any_axis,
            it_stops_where_it_is_told,
            what_has_no_features_is_refused,
            without_tensorly_it_says_what_to_install,
            the_transformer_gives_the_features_of_all_pixels,
            the_classifier_learns_from_labelled_pixels_only,
        ),
    )
]
