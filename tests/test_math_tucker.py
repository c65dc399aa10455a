"""Tucker-2 and the factorized forms, in weights and in the data's metric."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.errors import EditError, PliantError
from pliant.math.forms import (
    FORMS,
    blocks,
    compose,
    decompose,
    form_params,
    forms_for,
    kernel_shapes,
    max_ranks,
    relative_error,
)
from pliant.math.moments import dampen, refine, whiten
from pliant.math.tucker import tucker2

SHAPES = [(12, 8, 3, 3), (8, 12, 5), (5, 4, 2, 3, 2), (9, 6, 1, 1), (10, 3, 3, 3), (7, 9), (9, 7)]
CASES = [(shape, form) for shape in SHAPES for form in forms_for(shape)]
kernels = st.lists(st.integers(1, 5), min_size=2, max_size=5).map(tuple)


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def patch_moments(shape, samples=None, seed=3):
    """Second moments of strongly correlated inputs."""
    size = math.prod(shape[1:])
    mixing = seeded(size, size, seed=seed) * torch.logspace(0, -1.5, size)
    inputs = seeded(samples or 4 * size, size, seed=seed + 1) @ mixing.T
    return inputs.T @ inputs / len(inputs)


def channel_moments(shape):
    return patch_moments((shape[0], shape[1]))


def some_ranks(shape, form):
    most = max_ranks(shape, form)
    return {tuple(max(1, round(top * share)) for top in most) for share in (0.01, 0.3, 0.5, 0.8)}


def rebuilt(a_in, core, a_out):
    return torch.einsum("rs,qr...,tq->ts...", a_in, core, a_out)


@pytest.mark.parametrize("shape", [(24, 16, 3, 3), (10, 14, 5), (8, 6, 3, 2, 2), (40, 6, 1, 1)])
def test_tucker2_is_no_worse_than_tensorly(shape):
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import partial_tucker

    weight = seeded(*shape)
    for share in (0.2, 0.5, 0.8):
        rank_out, rank_in = (max(1, round(size * share)) for size in shape[:2])
        (core, (a_out, a_in)), _ = partial_tucker(
            weight.double().numpy(), rank=[rank_out, rank_in], modes=[0, 1]
        )
        theirs = tensorly.tenalg.multi_mode_dot(core, [a_out, a_in], modes=[0, 1])
        ours = rebuilt(*tucker2(weight, rank_in, rank_out))
        error = float((weight - torch.from_numpy(theirs)).norm())
        assert float((weight - ours).norm()) <= 1.001 * error


@pytest.mark.parametrize("shape", [(12, 8, 3, 3), (300, 20, 3), (4, 30, 1)])
def test_tucker2_factors_are_orthonormal_and_full_rank_is_exact(shape):
    weight = seeded(*shape)
    a_in, core, a_out = tucker2(weight, shape[1] // 2, shape[0] // 2)
    assert torch.allclose(a_in @ a_in.T, torch.eye(len(a_in)), atol=1e-5)
    assert torch.allclose(a_out.T @ a_out, torch.eye(len(core)), atol=1e-5)
    full = rebuilt(*tucker2(weight, shape[1], shape[0]))
    assert (full - weight).norm() <= 1e-5 * weight.norm()


def test_tucker2_sweeps_never_raise_the_error():
    weight = seeded(16, 12, 3, 3)
    fits = [rebuilt(*tucker2(weight, 4, 5, sweeps=sweeps)) for sweeps in range(6)]
    errors = [float((weight - fit).norm()) for fit in fits]
    assert all(after <= before + 1e-5 for before, after in zip(errors, errors[1:], strict=False))
    assert errors[-1] < errors[0]


def test_tucker2_refuses_impossible_ranks():
    with pytest.raises(PliantError, match=r"\(8, 12\)"):
        tucker2(seeded(12, 8, 3, 3), 9, 3)


@pytest.mark.parametrize(("shape", "form"), CASES)
@pytest.mark.parametrize("data", ["none", "patches", "channels"])
def test_full_rank_reproduces_the_kernel(shape, form, data):
    weight = seeded(*shape)
    makers = {"none": lambda _: None, "patches": patch_moments, "channels": channel_moments}
    ranks = max_ranks(shape, form)
    parts = decompose(weight, form, ranks, moments=makers[data](shape))
    assert (compose(parts, form) - weight).norm() <= 1e-5 * weight.norm()
    assert tuple(tuple(part.shape) for part in parts) == kernel_shapes(shape, form, ranks)
    assert sum(part.numel() for part in parts) == form_params(shape, form, ranks)


@settings(max_examples=40, deadline=None)
@given(kernels, st.data())
def test_every_form_fits_every_shape(shape, data):
    weight = seeded(*shape)
    form = data.draw(st.sampled_from(forms_for(shape)))
    most = max_ranks(shape, form)
    ranks = tuple(data.draw(st.integers(1, top)) for top in most)
    moments = data.draw(st.sampled_from([None, patch_moments(shape), channel_moments(shape)]))
    parts = decompose(weight, form, ranks, moments=moments)
    assert tuple(tuple(part.shape) for part in parts) == kernel_shapes(shape, form, ranks)
    assert relative_error(weight, compose(parts, form), moments) <= 1
    norms = torch.stack([part.norm() for part in parts])
    assert torch.allclose(norms, norms.mean().expand_as(norms), rtol=1e-3)


@pytest.mark.parametrize(("shape", "form"), CASES)
@pytest.mark.parametrize("make", [patch_moments, channel_moments])
def test_data_aware_error_is_at_most_the_weight_only_error(shape, form, make):
    weight = seeded(*shape)
    moments = make(shape)
    damped = dampen(moments.double())
    for ranks in some_ranks(shape, form):
        aware = compose(decompose(weight, form, ranks, moments=moments), form)
        plain = compose(decompose(weight, form, ranks), form)
        ours, theirs = (relative_error(weight, each, damped) for each in (aware, plain))
        assert ours <= theirs * (1 + 1e-6) + 1e-9
        ours, theirs = (relative_error(weight, each, moments) for each in (aware, plain))
        assert ours <= theirs * (1 + 1e-2) + 1e-4


@pytest.mark.parametrize(("shape", "form"), CASES)
def test_few_samples_make_no_trouble(shape, form):
    weight = seeded(*shape)
    moments = patch_moments(shape, samples=2)
    for ranks in some_ranks(shape, form):
        fit = compose(decompose(weight, form, ranks, moments=moments), form)
        plain = compose(decompose(weight, form, ranks), form)
        assert fit.isfinite().all()
        ours, theirs = (relative_error(weight, each, moments) for each in (fit, plain))
        assert ours <= theirs * (1 + 1e-2) + 1e-3


def test_output_form_reaches_the_optimum_of_the_whitened_svd():
    weight, moments = seeded(12, 8, 3, 3), dampen(patch_moments((12, 8, 3, 3)).double())
    sigma = torch.linalg.svdvals(weight.flatten(1).double() @ torch.linalg.cholesky(moments))
    for rank in (1, 4, 9):
        fit = compose(decompose(weight, "output", (rank,), moments=moments), "output")
        best = float(sigma[rank:].square().sum() / sigma.square().sum())
        assert relative_error(weight, fit, moments) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("form", ["tucker2", "input", "spatial"])
@pytest.mark.parametrize("ranks", [(4,), (4, 3, 1)])
def test_refining_never_raises_the_error(form, ranks):
    """Neither that of one size nor the sum over several that are cut from the same factors."""
    weight = seeded(12, 8, 3, 3).double()
    metric = dampen(patch_moments(weight.shape).double())
    block, white, _ = whiten(blocks(weight, form), metric)
    sizes = [(rank, rank + 1) if form == "tucker2" else (rank,) for rank in ranks]
    start = seeded(4, block.shape[1], seed=9).double()
    errors = []
    for sweeps in range(8):
        first, last, *rest = refine(block, white, [start], sizes, sweeps)
        total = 0.0
        for rank, *out in sizes:
            near = torch.einsum("trk,rp->tpk", last[:, :rank], first[:rank])
            if rest:
                near = torch.einsum("tq,qpk->tpk", rest[0][:, : out[0]], near[: out[0]])
            error = (block - near).flatten(1)
            total += float((error @ white * error).sum())
        errors.append(total)
    assert all(
        after <= before * (1 + 1e-9) for before, after in zip(errors, errors[1:], strict=False)
    )
    assert errors[-1] < errors[0]


def test_refined_input_form_reaches_a_stationary_point():
    weight, moments = seeded(6, 5, 3).double(), patch_moments((6, 5, 3)).double()
    metric = dampen(moments)
    parts = decompose(weight, "input", (2,), moments=moments, sweeps=200)
    leaves = [part.clone().requires_grad_() for part in parts]
    error = (weight - compose(leaves, "input")).flatten(1)
    objective = (error @ metric * error).sum()
    scale = float(((weight.flatten(1) @ metric) * weight.flatten(1)).sum())
    for gradient in torch.autograd.grad(objective, leaves):
        assert float(gradient.norm()) < 2e-2 * scale


def test_channel_moments_are_patch_moments_with_independent_positions():
    weight, channels = seeded(7, 5, 3, 3), channel_moments((7, 5))
    patches = torch.kron(channels, torch.eye(9))
    error = relative_error(weight, 0.3 * seeded(*weight.shape, seed=5), channels)
    same = relative_error(weight, 0.3 * seeded(*weight.shape, seed=5), patches)
    assert error == pytest.approx(same)
    for form, ranks in (("input", (2,)), ("output", (3,)), ("spatial", (4,))):
        fits = [
            compose(decompose(weight, form, ranks, moments=m), form) for m in (channels, patches)
        ]
        assert torch.allclose(*fits, atol=1e-3)


def test_moments_follow_the_columns_of_the_flattened_weight():
    conv = torch.nn.Conv2d(4, 6, 3, bias=False)
    images = seeded(5, 4, 8, 8)
    patches = torch.nn.functional.unfold(images, 3).transpose(1, 2).flatten(0, 1)
    moments = patches.T @ patches
    other = seeded(*conv.weight.shape)
    with torch.no_grad():
        exact, changed = conv(images), torch.nn.functional.conv2d(images, other)
    expected = float((exact - changed).square().sum() / exact.square().sum())
    assert relative_error(conv.weight, other, moments) == pytest.approx(expected, rel=1e-4)


def test_layers_of_each_form_compute_what_the_dense_kernel_does():
    weight, images = seeded(6, 5, 3, 3), seeded(2, 5, 9, 9)
    for form in ("tucker2", "input", "output", "spatial"):
        parts = decompose(
            weight, form, tuple(max(1, top // 2) for top in max_ranks((6, 5, 3, 3), form))
        )
        out = images
        for part in parts:
            out = torch.nn.functional.conv2d(out, part)
        dense = torch.nn.functional.conv2d(images, compose(parts, form))
        assert torch.allclose(out, dense, atol=1e-4)


@pytest.mark.parametrize(("shape", "form"), CASES)
@pytest.mark.parametrize("data", [False, True])
def test_zero_kernels_stay_zero(shape, form, data):
    moments = patch_moments(shape) if data else None
    parts = decompose(torch.zeros(shape), form, max_ranks(shape, form), moments=moments)
    assert not compose(parts, form).any()


@pytest.mark.parametrize(("shape", "form"), CASES)
def test_zero_moments_fall_back_to_the_weight_error(shape, form):
    weight = seeded(*shape)
    ranks = min(some_ranks(shape, form))
    size = math.prod(shape[1:])
    blind = compose(decompose(weight, form, ranks, moments=torch.zeros(size, size)), form)
    plain = relative_error(weight, compose(decompose(weight, form, ranks), form))
    assert relative_error(weight, blind) <= plain * 1.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("shape", "form"), CASES)
def test_kernels_keep_the_dtype_of_the_weight(shape, form, dtype):
    weight = (seeded(*shape) / 10).to(dtype)
    ranks = max_ranks(shape, form)
    for moments in (None, patch_moments(shape).to(dtype)):
        parts = decompose(weight, form, ranks, moments=moments)
        assert all(part.dtype == dtype for part in parts)
        assert relative_error(weight, compose(parts, form)) < 1e-3


@pytest.mark.parametrize(("shape", "form"), CASES)
def test_rank_one_kernels_are_reproduced_at_rank_one(shape, form):
    parts = [seeded(size, seed=axis) for axis, size in enumerate(shape)]
    weight = parts[0]
    for part in parts[1:]:
        weight = weight[..., None] * part
    ones = (1,) * len(max_ranks(shape, form))
    for moments in (None, patch_moments(shape)):
        fit = compose(decompose(weight, form, ones, moments=moments), form)
        assert relative_error(weight, fit) < 1e-8


def test_relative_error_of_zero_kernels():
    zero = torch.zeros(3, 2)
    assert relative_error(zero, zero) == 0
    assert relative_error(zero, zero + 1) == math.inf


@pytest.mark.parametrize(
    ("shape", "form", "ranks", "message"),
    [
        ((4, 3, 3, 3), "cp", (2,), "One of the forms"),
        ((4, 3), "tucker2", (2, 2), "'svd'"),
        ((4, 3, 5), "spatial", (2,), "tucker2"),
        ((4, 3, 3, 3), "svd", (2,), "spatial"),
        ((4, 3, 3, 3), "tucker2", (2,), r"\(3, 4\)"),
        ((4, 3, 3, 3), "input", (4,), r"\(3,\)"),
        ((4, 3, 3, 3), "output", (0,), r"\(4,\)"),
    ],
)
def test_misfits_are_refused_with_what_would_fit(shape, form, ranks, message):
    with pytest.raises(EditError, match=message):
        decompose(seeded(*shape), form, ranks)
    with pytest.raises(EditError, match=message):
        form_params(shape, form, ranks)


def test_moments_that_are_not_finite_are_refused():
    with pytest.raises(PliantError, match="overflow"):
        decompose(seeded(4, 3), "svd", (2,), moments=torch.full((3, 3), math.nan))


def test_moments_with_negative_eigenvalues_are_damped_until_definite():
    indefinite = torch.diag(torch.tensor([4.0, 1.0, -0.5]))
    assert torch.linalg.eigvalsh(dampen(indefinite)).min() > 0


def test_moments_of_another_layer_are_refused():
    with pytest.raises(EditError, match="size 3 .* or 27"):
        decompose(seeded(4, 3, 3, 3), "input", (2,), moments=torch.eye(9))
    assert set(FORMS) == {form for shape in SHAPES for form in forms_for(shape)}
