"""Orthogonal loss: where features end up, what the losses are, and that any basis serves."""

from typing import get_args

import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

from pliant.cost import cost
from pliant.errors import DataError, EditError, MethodError, ModelError
from pliant.math.placement import Kind, cosines, norm_gap, off_span, placement
from pliant.methods.train.orthogonal_loss import OrthogonalLoss
from pliant.nn.basis import OrthogonalBasis
from pliant.run import Run, start
from pliant.testing import Case

KINDS: tuple[Kind, ...] = get_args(Kind)


def noise(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def basis_of(features: int, classes: int, kind: str = "random") -> OrthogonalBasis:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return OrthogonalBasis(features, classes, kind).double()


def free_vectors_reach_their_directions() -> None:
    """Cosines above 0.999, classes orthogonal to 1e-3; 3 q has the right angle, but is not s q.

    Those of the softmax lean away from the other classes: c_y is the root of 1 - 1/K.
    """
    labels = torch.arange(12) % 4
    for kind in KINDS:
        basis = basis_of(6, 4)
        free = noise(12, 6, seed=1).requires_grad_()
        optimizer = Adam([free], 0.05)
        for _ in range(800):
            optimizer.zero_grad()
            found = placement(kind, free, basis(free), labels, temperature=4.0)
            (found + 1e-3 * norm_gap(free, 1.0)).mean().backward()
            optimizer.step()
        cosine = cosines(free, basis(free)).detach().gather(1, labels[:, None])
        if kind == "softmax":
            assert torch.allclose(cosine, torch.tensor(0.75).sqrt().double(), atol=1e-2)
            continue
        assert cosine.min() > 0.999, kind
        means = F.normalize(torch.stack([free[labels == k].mean(0) for k in range(4)]).detach())
        assert (means @ means.T - torch.eye(4)).abs().max() < 1e-3, kind
    far = 3 * basis.directions.T.double()
    losses = {kind: placement(kind, far, basis(far), torch.arange(4)) for kind in KINDS}
    assert losses["angle"].abs().max() < 1e-6 and losses["energy"].abs().max() < 1e-6
    assert torch.allclose(losses["placement"], torch.full((4,), 4 / 6, dtype=torch.float64))


def losses_are_what_they_say() -> None:
    """Energy off the axis, mean squared error on one-hot labels, cross-entropy."""
    basis, labels = basis_of(7, 4), torch.arange(20) % 4
    h = noise(20, 7)
    h += 6 * basis.directions.T.double()[labels]  # on the right side
    p = basis(h)
    c, others = cosines(h, p), 1 - F.one_hot(labels, 4)
    outside = off_span(h, p)
    off_axis = (others * c**2).sum(1) + outside
    assert torch.allclose(placement("energy", h, p, labels), off_axis, atol=1e-6)
    rest = h - p @ basis.directions.T.double()
    assert torch.allclose(outside, (rest.norm(dim=1) / h.norm(dim=1)) ** 2, atol=1e-6)
    one_hot = F.one_hot(labels, 7).double()
    mse = F.mse_loss(h, one_hot, reduction="none").mean(1)
    assert torch.allclose(placement("placement", h, h, labels), mse)
    found = placement("softmax", h, p, labels, temperature=9.0)
    assert torch.allclose(found, F.cross_entropy(9 * c, labels, reduction="none"))
    shifted = placement("softmax", h, p, labels, temperature=9.0, margin=0.3)
    logits = 9 * (c - 0.3 * F.one_hot(labels, 4))
    assert torch.allclose(shifted, F.cross_entropy(logits, labels, reduction="none"))
    wrong = placement("energy", -h, -p, labels, gamma=2.0)
    own = c.gather(1, labels[:, None])[:, 0]
    assert torch.allclose(wrong, 1 + 2.0 * own)


def gradients_are_exact_and_the_angle_is_free_of_the_norm() -> None:
    basis, labels = basis_of(6, 3), torch.arange(5) % 3
    for kind in KINDS:
        h = noise(5, 6, seed=2).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda h, kind=kind: placement(kind, h, basis(h), labels), h
        )
    assert torch.autograd.gradcheck(lambda h: norm_gap(h, 2.0), h)
    h = noise(5, 6, seed=3).requires_grad_()
    placement("angle", h, basis(h), labels).sum().backward()
    assert h.grad is not None and (h.grad * h).sum(1).abs().max() < 1e-12
    own = cosines(h, basis(h)).gather(1, labels[:, None]).detach()
    norms, axis = h.detach().norm(dim=1, keepdim=True), basis.directions.T.double()[labels]
    assert torch.allclose(h.grad, -(axis - own * h.detach() / norms) / norms, atol=1e-6)
    zero = torch.zeros(2, 6, requires_grad=True)
    (placement("angle", zero, zero, labels[:2]) + norm_gap(zero, 1.0)).sum().backward()
    assert zero.grad is not None and zero.grad.isfinite().all()


def a_rotation_changes_nothing() -> None:
    basis, labels, h = basis_of(6, 4), torch.arange(9) % 4, noise(9, 6)
    turn = torch.linalg.qr(noise(6, 6, seed=5)).Q
    q = basis.directions.double()
    for kind in KINDS:
        here = placement(kind, h, h @ q, labels, gamma=0.5, radius=2.0, margin=0.1)
        there = h @ turn.T
        turned = placement(
            kind, there, there @ (turn @ q), labels, gamma=0.5, radius=2.0, margin=0.1
        )
        assert torch.allclose(here, turned)
    assert torch.equal((h @ q).argmax(1), (there @ (turn @ q)).argmax(1))
    assert torch.equal(basis.predict_class(h), (h @ q).argmax(1))


def bases_are_orthonormal() -> None:
    for kind, features, classes in (
        *(("blocks", 7, 3), ("blocks", 4, 4), ("identity", 9, 4), ("random", 5, 5)),
        *(("random", 9, 4), ("hadamard", 8, 5)),
    ):
        basis = basis_of(features, classes, kind)
        q = basis.directions.double()
        assert torch.allclose(q.T @ q, torch.eye(classes).double(), atol=1e-6), kind
        x = noise(2, 3, features)
        assert torch.allclose(basis(x), x @ q, atol=1e-6)
        assert not [*basis.parameters()]
        sample = (x[:1, 0],)
        counted = cost(nn.Sequential(basis), sample)
        stored = kind in ("random", "hadamard")
        assert counted.macs == counted.params == (features * classes if stored else 0)
        assert counted.bytes == 8 * counted.params
    hadamard = torch.as_tensor(scipy.linalg.hadamard(8) / 8**0.5)
    assert torch.allclose(basis_of(8, 8, "hadamard").directions.double(), hadamard, atol=1e-6)
    assert torch.equal(basis_of(6, 6, "blocks").directions, torch.eye(6))
    assert (basis_of(8, 3, "blocks").directions >= 0).all()  # rectified features reach them
    for features, kind, words in (
        (3, "blocks", "3 features for 4"),
        (6, "hadamard", "power of two"),
        (4, "q", "basis of"),
    ):
        with pytest.raises(EditError, match=words):
            OrthogonalBasis(features, 4, kind)


def network(features: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, features), nn.ReLU(), nn.Linear(features, 3))


def begun(model: nn.Module, method: OrthogonalLoss, steps: int = 10) -> Run:
    optimizer = SGD([*model.parameters()], 0.1)
    return start(model, method, example=(noise(2, 5).float(),), optimizer=optimizer, steps=steps)


def the_loss_of_the_task_gives_way() -> None:
    """The head never learns; a warm-up keeps the task's loss; labels that are none do not count."""
    model = network()
    run = begun(model, OrthogonalLoss("placement", warmup=0.1, norm=0.5))
    x, labels = noise(6, 5).float(), torch.tensor([0, 1, 2, -100, 1, 0])
    task = F.cross_entropy(model(x), labels)
    assert run.loss(task, model(x), (x, labels)) is task
    run.after_step()
    found = run.loss(task, model(x), (x, labels))
    h = model[1](model[0](x))[labels >= 0]
    own = labels[labels >= 0]
    wanted = placement("placement", h, model[2](h), own, radius=3**0.5) + 0.5 * norm_gap(h, 3**0.5)
    assert torch.allclose(found, wanted.mean()) and isinstance(model[2], OrthogonalBasis)
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}  # type: ignore[union-attr]
    assert held == {id(p) for p in model.parameters()} and len(held) == 2
    with pytest.raises(DataError, match="one class number"):
        run.loss(task, model(x), (x, x))


def networks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="head 2 has 2 features for 3"):
        begun(network(2), OrthogonalLoss())
    with pytest.raises(ModelError, match="head 2 has 6 features, but a Hadamard"):
        begun(network(6), OrthogonalLoss(basis="hadamard"))
    with pytest.raises(ModelError, match="ends in something else"):
        begun(nn.Sequential(*network(), nn.LogSoftmax(1)), OrthogonalLoss())
    model = network()
    run = begun(model, OrthogonalLoss(), steps=0)
    assert type(model[2]) is nn.Linear and "trained" in run.reasons["2"]
    with pytest.raises(MethodError, match="no steps"):
        run.loss(torch.zeros(()), model(noise(1, 5).float()), (None, torch.tensor([0])))


def training_separates_the_classes() -> None:
    """Three clouds of points: all of them are told apart, along directions that are orthogonal."""
    model, labels = network(), torch.arange(90) % 3
    x = noise(90, 5).float() + 4 * F.one_hot(labels, 5)
    run = begun(model, OrthogonalLoss(), steps=200)
    for _ in range(run.steps):
        output = model(x)
        model.zero_grad()
        run.loss(F.cross_entropy(output, labels), output, (x, labels)).backward()
        run.before_step()
        run.optimizer.step()  # type: ignore[union-attr]
        run.after_step()
    run.finish()
    hidden = model[1](model[0](x)).detach()
    assert (model(x).argmax(1) == labels).float().mean() > 0.95
    means = F.normalize(torch.stack([hidden[labels == k].mean(0) for k in range(3)]))
    assert (means @ means.T - torch.eye(3)).abs().max() < 0.3


CASES = [
    Case(
        "orthogonal_loss",
        variants=(
            "orthogonal_loss(kind='softmax', basis='random', margin=0.1)",
            "orthogonal_loss(kind='energy')",
            "orthogonal_loss(kind='placement', basis='hadamard', warmup=0.3)",
        ),
        refuses={"single": "ends in something else"},
        own=(
            free_vectors_reach_their_directions,
            losses_are_what_they_say,
            gradients_are_exact_and_the_angle_is_free_of_the_norm,
            a_rotation_changes_nothing,
            bases_are_orthonormal,
            the_loss_of_the_task_gives_way,
            networks_that_do_not_fit_are_refused,
            training_separates_the_classes,
        ),
    )
]
