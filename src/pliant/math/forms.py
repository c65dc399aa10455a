"""The factorized forms of a kernel: which layers stand for it, and the best weights for them.

    tucker2  (r_in, r_out)  1x1 S->r_in, DxD r_in->r_out, 1x1 r_out->T
    input    (r,)           1x1 S->r, DxD r->T
    output   (r,)           DxD S->r, 1x1 r->T
    spatial  (r,)           Dx1 S->r, 1xD r->T   (the first kernel axis, then all others)
    svd      (r,)           S->r->T for Linear and pointwise kernels

Input and spatial are one problem: with the first kernel axis counted among the input channels
(S*D of them), a spatial form is an input form of the rest. `blocks` lays a kernel out for it.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pliant.errors import EditError
from pliant.math.moments import dampen, mix_inputs, project_outputs, refine, whiten
from pliant.math.reads import Gram, Reads
from pliant.math.svd import (
    balance,
    leading,
    norm_shares,
    plain_dtype,
    self_product,
    strongest,
    truncated_svd,
    unfold,
)
from pliant.math.tucker import tucker2

FORMS = ("tucker2", "input", "output", "spatial", "svd")
SWEEPS = 20

Shape = tuple[int, ...]


def decompose(
    weight: Tensor,
    form: str,
    ranks: Sequence[int],
    *,
    moments: Tensor | None = None,
    sweeps: int = SWEEPS,
    sizes: Sequence[Sequence[int]] = (),
) -> tuple[Tensor, ...]:
    """Factorize a kernel into the kernels of the layers that replace it, in their order.

    Without moments the factors minimise the weight error. With the second moments of the
    layer's inputs they minimise the output error E ||(W - W') x||^2: exactly for output, svd
    and (given channel moments only) input and spatial; otherwise from a whitened start by
    sweeps that never raise it. The Frobenius norm is shared equally between the kernels,
    because a kernel with a small norm moves relatively faster at the same learning rate: equal
    norms let one rate fit all layers.

    Args:
        weight: kernel (T, S, *kernel), or (T, S) of a Linear layer.
        form: one of `FORMS`.
        ranks: (r_in, r_out) for tucker2, (r,) for the others.
        moments: (S, S) over channels, or (S*prod(kernel),) * 2 over patches in the order of
            weight.reshape(T, -1) columns; symmetric, positive semi-definite.
        sweeps: most alternating sweeps to make, of Tucker-2 or of the data-aware refinement.
        sizes: ranks to which the factors will be cut. With patch moments tucker2, input and
            spatial then lose least in the sum over them, and keep their components in order.

    Raises:
        EditError: unknown form, or form, ranks or moments that do not fit the kernel.
    """
    ranks = tuple(ranks)
    _check(weight.shape, form, ranks)
    dense = weight.detach().double() if moments is not None else weight.detach()
    metric = None if moments is None else dampen(_checked(moments, weight.shape).to(dense))
    if metric is None:
        kernels = _plain(dense.to(plain_dtype(dense.dtype)), form, ranks, sweeps)
    elif len(metric) == weight.shape[1]:
        kernels = _whitened(dense, form, ranks, metric, sweeps)
    else:
        kernels = _aware(dense, form, ranks, metric, sweeps, [tuple(size) for size in sizes])
    balanced = _evened(kernels) if sizes else _balanced(kernels)
    return tuple(kernel.to(weight.dtype).contiguous() for kernel in balanced)


def principal(weight: Tensor, reads: Reads, most: int) -> tuple[Tensor, Tensor]:
    """Return what each direction of the outputs is worth, and the strongest of them.

    The eigenvectors U of W C W^T: the leading ones give W' = U U^T W, an exact optimum that
    inverts nothing (Eckart-Young for W C^(1/2)). Where outputs are fewer than inputs, no matrix is
    as wide as these are.

    Args:
        weight: kernel (T, S, *kernel), or (T, S).
        reads: second moments of what the layer reads.
        most: how many directions are wanted.

    Returns:
        energies (min(T, columns),), falling, and an orthonormal basis (T, most), in float64.
    """
    flat = weight.detach().flatten(1).double()
    if len(flat) <= flat.shape[1]:
        values, vectors = torch.linalg.eigh(reads.outer(flat))
        return values.flip(0).clamp_min(0), vectors[:, -most:].flip(1)
    tall = flat @ (reads if isinstance(reads, Gram) else Gram(reads.dense())).root
    values, vectors = torch.linalg.eigh(self_product(tall.T))
    return values.flip(0).clamp_min(0), torch.linalg.qr(tall @ vectors[:, -most:].flip(1))[0]


def projected(weight: Tensor, form: str, ranks: Sequence[int], reads: Reads) -> tuple[Tensor, ...]:
    """Factorize a kernel into the best layers for what it reads, in the forms output and svd.

    The leading eigenvectors U of W C W^T give W' = U U^T W: see `principal`.

    Args:
        weight: kernel (T, S, *kernel), or (T, S).
        form: ``output`` or ``svd``.
        ranks: (r,).
        reads: second moments of what the layer reads.
    """
    ranks, flat = tuple(ranks), weight.detach().flatten(1).double()
    if len(flat) <= flat.shape[1]:
        basis = strongest(reads.outer(flat), ranks[0])
    else:
        basis = principal(weight, reads, ranks[0])[1]
    return onto(weight, form, basis)


def onto(weight: Tensor, form: str, basis: Tensor) -> tuple[Tensor, ...]:
    """Factorize a kernel into U^T W and U, for an orthonormal basis U (T, r) of outputs."""
    shapes = kernel_shapes(weight.shape, form, (basis.shape[1],))
    flat = weight.detach().flatten(1).to(basis.dtype)
    factors = (basis.T @ flat).reshape(shapes[0]), basis.reshape(shapes[1])
    return tuple(kernel.to(weight.dtype).contiguous() for kernel in _balanced(factors))


def compose(kernels: Sequence[Tensor], form: str) -> Tensor:
    """Multiply the kernels of a form out into the dense kernel (T, S, *kernel)."""
    parts = [kernel.to(plain_dtype(kernel.dtype)) for kernel in kernels]
    if form == "spatial":
        dense = _compose_spatial(parts[0], parts[1])
    elif form == "tucker2":
        dense = _mix_outputs(mix_inputs(parts[1], parts[0].flatten(1)), parts[2].flatten(1))
    elif form == "input":
        dense = mix_inputs(parts[1], parts[0].flatten(1))
    elif form in ("output", "svd"):
        dense = _mix_outputs(parts[0], parts[1].flatten(1))
    else:
        raise _unknown(form)
    return dense.to(kernels[0].dtype)


def forms_for(shape: Sequence[int]) -> tuple[str, ...]:
    """Return the forms that a kernel of this shape can take."""
    kernel = tuple(shape[2:])
    if not kernel:
        return ("svd",)
    spatial = ("spatial",) if len(kernel) >= 2 else ()
    point = ("svd",) if math.prod(kernel) == 1 else ()
    return ("tucker2", "input", "output", *spatial, *point)


def max_ranks(shape: Sequence[int], form: str) -> Shape:
    """Return the ranks beyond which a form cannot gain: there it reproduces any kernel.

    Raises:
        EditError: unknown form, or one that a kernel of this shape cannot take.
    """
    _check_form(shape, form)
    out, channels, kernel = shape[0], shape[1], math.prod(shape[2:])
    if form == "tucker2":
        return min(channels, out * kernel), min(out, channels * kernel)
    if form == "input":
        return (min(channels, out * kernel),)
    if form == "spatial":
        return (min(channels * shape[2], out * kernel // shape[2]),)
    return (min(out, channels * kernel),)


def kernel_shapes(shape: Sequence[int], form: str, ranks: Sequence[int]) -> tuple[Shape, ...]:
    """Return the shapes of the kernels that `decompose` would give, in their order.

    Raises:
        EditError: unknown form, or form or ranks that do not fit the shape.
    """
    _check(shape, form, tuple(ranks))
    out, channels, kernel = shape[0], shape[1], tuple(shape[2:])
    point = (1,) * len(kernel)
    first, last = ranks[0], ranks[-1]
    if form == "tucker2":
        return (first, channels, *point), (last, first, *kernel), (out, last, *point)
    if form == "input":
        return (first, channels, *point), (out, first, *kernel)
    if form == "spatial":
        return (first, channels, kernel[0], *point[1:]), (out, first, 1, *kernel[1:])
    return (first, channels, *kernel), (out, first, *point)


def form_params(shape: Sequence[int], form: str, ranks: Sequence[int]) -> int:
    """Count the weights of a form at these ranks (biases excluded)."""
    return sum(math.prod(kernel) for kernel in kernel_shapes(shape, form, ranks))


def relative_error(weight: Tensor, approximation: Tensor, moments: Tensor | None = None) -> float:
    """Return the squared error over the squared norm, in weights or in the data's metric.

    With moments C the metric is tr(E C E^T); they are as in `decompose`. A zero kernel counts
    as 0 if it is met exactly, else as infinity.
    """
    dense, other = weight.detach().double(), approximation.detach().double()
    error, total = dense - other, dense
    if moments is not None:
        metric = _checked(moments, weight.shape).double()
        lost, whole = _quadratic(error, metric), _quadratic(total, metric)
    else:
        lost, whole = float(error.square().sum()), float(total.square().sum())
    if whole <= 0.0:
        return 0.0 if lost <= 0.0 else math.inf
    return max(lost, 0.0) / whole


def blocks(weight: Tensor, form: str) -> Tensor:
    """Lay a kernel out as (T, columns of the first layer, kernel of the last layer)."""
    if form == "spatial":
        return weight.reshape(weight.shape[0], weight.shape[1] * weight.shape[2], -1)
    return weight.reshape(weight.shape[0], weight.shape[1], -1)


def _plain(dense: Tensor, form: str, ranks: Shape, sweeps: int) -> tuple[Tensor, ...]:
    """Best factors for the weight error, in the shapes of the layers."""
    shapes = kernel_shapes(dense.shape, form, ranks)
    if form == "tucker2":
        factors: Sequence[Tensor] = tucker2(dense, *ranks, sweeps=sweeps)
    elif form in ("output", "svd"):
        left, right = truncated_svd(dense.flatten(1), ranks[0])
        factors = (right, left)
    else:
        factors = _input_svd(blocks(dense, form), ranks[0])
    return tuple(factor.reshape(shape) for factor, shape in zip(factors, shapes, strict=True))


def _input_svd(block: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-r split of (T, S, K) into (r, S) and (T, r, K)."""
    out, channels, kernel = block.shape
    left, right = truncated_svd(block.transpose(0, 1).reshape(channels, -1), rank)
    return left.T, right.reshape(rank, out, kernel).transpose(0, 1)


def _whitened(
    dense: Tensor, form: str, ranks: Shape, metric: Tensor, sweeps: int
) -> tuple[Tensor, ...]:
    """Channel moments are a change of basis of the input axis: factorize there, come back."""
    root = torch.linalg.cholesky(metric)
    first, *rest = _plain(mix_inputs(dense, root), form, ranks, sweeps)
    aware = (mix_inputs(first, torch.linalg.inv(root)), *rest)
    if form != "tucker2":
        return aware
    # Tucker-2 has local optima: never hand out less than the plain one.
    candidates = (aware, _plain(dense, form, ranks, sweeps))
    return min(candidates, key=lambda each: relative_error(dense, compose(each, form), metric))


def _aware(
    dense: Tensor, form: str, ranks: Shape, metric: Tensor, sweeps: int, sizes: Sequence[Shape]
) -> tuple[Tensor, ...]:
    """Best factors for patch moments: closed form, or a whitened start and refinement."""
    shapes = kernel_shapes(dense.shape, form, ranks)
    if form in ("output", "svd"):
        factors: Sequence[Tensor] = project_outputs(dense.flatten(1), metric, ranks[0])
    else:
        block, white, root = whiten(blocks(dense, form), metric)
        plain = _plain(dense, form, ranks, sweeps)[0].flatten(1)
        starts = [_start(block, form, ranks, sweeps), plain @ root]
        first, *rest = refine(block, white, starts, sizes or [ranks], sweeps)
        factors = (first @ torch.linalg.inv(root), *rest)
    return tuple(factor.reshape(shape) for factor, shape in zip(factors, shapes, strict=True))


def _start(block: Tensor, form: str, ranks: Shape, sweeps: int) -> Tensor:
    """The first layer that would be best if the whitened columns were white."""
    if form == "tucker2":
        return tucker2(block, *ranks, sweeps=sweeps)[0]
    return _input_svd(block, ranks[0])[0]


def _balanced(kernels: Sequence[Tensor]) -> list[Tensor]:
    """Share the norm equally between kernels, component by component where there are two."""
    if len(kernels) == 3:
        return norm_shares(*_ordered(*kernels))
    first, last = kernels
    rank, others = len(first), last.transpose(0, 1)
    left, right = balance(first.reshape(rank, -1).T, others.reshape(rank, -1))
    return [left.T.reshape(first.shape), right.reshape(others.shape).transpose(0, 1)]


def _evened(kernels: Sequence[Tensor]) -> list[Tensor]:
    """Give every component the same norm in the kernels on either side, and leave their order."""
    kernels = list(kernels)
    for left, right in pairwise(range(len(kernels))):
        near, far = kernels[left].flatten(1), kernels[right].transpose(0, 1).flatten(1)
        ratio = (far.norm(dim=1) / near.norm(dim=1)).sqrt()
        scale = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
        kernels[left] = (near * scale[:, None]).reshape(kernels[left].shape)
        mended = (far / scale[:, None]).reshape(kernels[right].transpose(0, 1).shape)
        kernels[right] = mended.transpose(0, 1)
    return norm_shares(*kernels)


def _ordered(first: Tensor, core: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn Tucker-2 factors orthonormal, with the core's directions in order of importance."""
    basis_in, inner = torch.linalg.qr(first.flatten(1).T)
    basis_out, outer = torch.linalg.qr(last.flatten(1))
    core = _mix_outputs(mix_inputs(core, inner.T), outer)
    turn_in = leading(unfold(core, 1), core.shape[1]).to(core.dtype)
    turn_out = leading(unfold(core, 0), core.shape[0]).to(core.dtype)
    core = _mix_outputs(mix_inputs(core, turn_in), turn_out.T)
    first = (basis_in @ turn_in).T.reshape(first.shape)
    return first, core, (basis_out @ turn_out).reshape(last.shape)


def _mix_outputs(kernel: Tensor, matrix: Tensor) -> Tensor:
    """Multiply the output axis of a kernel (r, S, ...) by a matrix (T, r)."""
    return torch.einsum("tr,rs...->ts...", matrix, kernel)


def _compose_spatial(first: Tensor, last: Tensor) -> Tensor:
    """Multiply (r, S, D, 1..) and (T, r, 1, ...) out."""
    dense = torch.einsum("rsd,trk->tsdk", first.flatten(2), last.flatten(2))
    return dense.reshape(*dense.shape[:3], *last.shape[3:])


def _quadratic(error: Tensor, metric: Tensor) -> float:
    """tr(E C E^T) for patch moments, or for channel moments at every position alike."""
    if len(metric) == error.shape[1]:
        return float((torch.einsum("ts...,sq->tq...", error, metric) * error).sum())
    flat = error.flatten(1)
    return float((flat @ metric * flat).sum())


def _checked(moments: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the moments if they fit a kernel of this shape."""
    sizes = (shape[1], math.prod(shape[1:]))
    if moments.ndim != 2 or moments.shape[0] != moments.shape[1] or len(moments) not in sizes:
        raise EditError(
            f"Square moments of size {sizes[0]} (channels) or {sizes[1]} (patches) were expected "
            f"for a kernel of shape {tuple(shape)}, not {tuple(moments.shape)}: "
            "capture them at the input of this layer."
        )
    return moments.detach()


def _check(shape: Sequence[int], form: str, ranks: Shape) -> None:
    most = max_ranks(shape, form)
    fits = len(ranks) == len(most) and all(
        1 <= rank <= top for rank, top in zip(ranks, most, strict=True)
    )
    if not fits:
        raise EditError(
            f"Ranks from {(1,) * len(most)} to {most} were expected for form {form!r} on shape "
            f"{tuple(shape)}, not {ranks}: choose ranks in that range."
        )


def _check_form(shape: Sequence[int], form: str) -> None:
    if form not in FORMS:
        raise _unknown(form)
    allowed = forms_for(shape)
    if form not in allowed:
        raise EditError(
            f"A kernel of shape {tuple(shape)} was expected to take one of {allowed}, not "
            f"{form!r}: choose one of those."
        )


def _unknown(form: str) -> EditError:
    return EditError(f"One of the forms {FORMS} was expected, not {form!r}: choose one of those.")
