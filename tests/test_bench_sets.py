"""The sets that the clustering bench draws, and what it expects of ETH-80."""

import numpy as np
import pytest

import pliant
from bench import sets
from bench.experiments import Cell, clustering, load
from tests.conftest import needs_data

PLAN = {"sets": 4, "images": 8}


def test_a_share_of_the_columns_comes_from_any_set():
    plain, truth = sets.draw("digits", PLAN, 0)
    spoilt, same = sets.draw("digits", {**PLAN, "replaced": 0.5}, 0)
    assert len(plain) == 2 and np.array_equal(truth, same) and len(truth) == 40
    for before, after in zip(plain[0], spoilt[0], strict=True):
        assert (before != after).any(0).sum() <= 4
    assert (
        np.mean(
            [(a != b).any(0).sum() for a, b in zip(*(v[0] for v in (plain, spoilt)), strict=True)]
        )
        > 3
    )


def test_noise_is_in_units_of_the_numbers():
    random = np.random.default_rng(0)
    plain = [random.standard_normal((5, 400)) * 3 + 10 for _ in range(4)]
    spoilt = sets.noisy(plain, 2.0, np.random.default_rng(1))
    added = np.concatenate(spoilt, 1) - np.concatenate(plain, 1)
    assert added.std() == pytest.approx(6, rel=0.05)


def test_no_digit_is_in_two_sets():
    columns = np.concatenate(sets.draw("digits", {"sets": 20, "images": 8}, 0)[0][0], 1)
    images = sets._digit_images()[0].reshape(-1, 64)
    assert len(np.unique(columns, axis=1).T) >= len(np.unique(images, axis=0)) * 1600 / 1797 - 40


def test_sparse_representations_stay_within_subspaces():
    random = np.random.default_rng(0)
    bases = [np.linalg.qr(random.standard_normal((20, 2)))[0] for _ in range(3)]
    vectors = np.concatenate([random.standard_normal((10, 2)) @ basis.T for basis in bases])
    affinity = sets.sparse_representation(vectors, 0.1)
    same = np.repeat(np.arange(3), 10)[:, None] == np.repeat(np.arange(3), 10)
    assert affinity[~same].sum() < 0.05 * affinity.sum()
    assert clustering.scored(clustering._spectral(affinity, 3, 0), np.repeat(np.arange(3), 10)) == {
        "accuracy": 1.0,
        "nmi": pytest.approx(1.0),
        "ari": 1.0,
    }


def test_skeletons_are_places_and_velocities():
    needs_data("skeletons")
    views, truth = sets.draw("skeletons", {}, 0)
    assert len(truth) == 198 and np.bincount(truth).min() == 19
    for place, velocity in zip(*views, strict=True):
        assert place.shape[0] == 60 and np.allclose(place[:3], 0)  # the hip
        assert np.allclose(np.diff(place, axis=1), velocity)


def test_eth80_is_divided_as_well_as_was_aimed_at():
    needs_data("eth80")
    views, truth = sets.draw("eth80", {}, 0)
    for seed in range(3):
        labels = pliant.cluster(np.stack(views[0]), 8, "product_grassmann_lrr", seed=seed).value
        assert clustering.scored(labels, truth)["accuracy"] >= 0.8375


def test_every_rival_of_the_bench_clusters():
    settings = load("clustering").settings
    task, plan = "digits", settings["tasks"]["digits"]
    for name, rival in settings["rivals"].items():
        full = {"data": "digits", "sets": 3, "images": 6, "groups": 10, "size": 5, **rival}
        found = clustering.measure(Cell({"task": task, "rival": name, "seed": 0}, full), print)
        assert found["accuracy"] > 0.3, name
    assert plan["views"] == 2
