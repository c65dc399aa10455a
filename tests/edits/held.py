"""What every edit must hold, whatever it does: files, resuming, optimizers, exports, costs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from pliant import compress, load
from pliant.cost import LayerCost, module_cost
from pliant.data import Train
from pliant.edits import Edit, from_json, replay, to_json
from pliant.files.onnx import to_onnx
from pliant.method import Method
from pliant.render.markdown import markdown
from pliant.run import Run, start
from pliant.testing.compressed import same_tensors
from pliant.testing.toys import CLASSES

Build = Callable[[], nn.Module]
STEPS, EDITED = 6, 2  # of a training; the step after which the network is edited
PLANS: dict[str, Sequence[Edit]] = {}
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: SGD(model.parameters(), 0.01, momentum=0.9),
    "adam": lambda model: Adam(model.parameters(), 1e-3),
}


@dataclass(frozen=True)
class Editing(Method):
    """Makes the edits of a plan in the middle of the training, or at its end without one."""

    plan: str

    def after_step(self, run: Run) -> None:
        if run.step == EDITED:
            run.apply(*PLANS[self.plan])

    def finalize(self, run: Run) -> None:
        if not run.edits:
            run.apply(*PLANS[self.plan])


@dataclass(frozen=True)
class Whole:
    """A network, what is to be done to it, and a batch for it.

    Args:
        name: of the plan.
        build: makes the network; seeded.
        edits: in order.
        shape: of one input.
    """

    name: str
    build: Build
    edits: tuple[Edit, ...]
    shape: tuple[int, ...]

    def model(self, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build()

    def inputs(self, count: int = 8) -> Tensor:
        return torch.randn(count, *self.shape, generator=torch.Generator().manual_seed(1))

    def method(self) -> Editing:
        PLANS[self.name] = self.edits
        return Editing(self.name)

    def edited(self) -> nn.Module:
        model = self.model().eval()
        replay(model, self.edits)
        return model


def comes_back_from_json(whole: Whole) -> None:
    rows = json.loads(json.dumps(to_json(whole.edits), allow_nan=False))
    assert tuple(from_json(rows)) == whole.edits
    assert {*from_json(rows)} == {*whole.edits}


def replays_without_data(whole: Whole) -> None:
    done, empty = whole.edited(), whole.model()
    with torch.device("meta"):
        shapes = whole.build()
    replay(shapes, whole.edits, weights=False)
    assert all(t.is_meta for t in (*shapes.parameters(), *shapes.buffers()))
    assert sizes(shapes) == sizes(done)
    before = torch.get_rng_state()
    replay(empty, whole.edits, weights=False)
    assert torch.equal(before, torch.get_rng_state())
    assert sizes(empty) == sizes(done)
    empty.load_state_dict(done.state_dict())
    x = whole.inputs()
    with torch.no_grad():
        assert torch.equal(empty.eval()(x), done(x))


def sizes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def draws_the_same_again(whole: Whole) -> None:
    same_tensors(whole.edited(), whole.edited(), "edited a second time")


def keeps_dtype_mode_and_frozen_weights(whole: Whole) -> None:
    for training in (True, False):
        model = whole.model().double().requires_grad_(False).train(training)
        replay(model, whole.edits)
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        assert not any(p.requires_grad for p in model.parameters())
        assert {module.training for module in model.modules()} == {training}


def exports_with_equal_outputs(whole: Whole, folder: Path) -> None:
    model, x = whole.edited(), whole.inputs(2)
    assert to_onnx(model, folder / "a.onnx", (x,)).max_difference < 1e-4


def costs_what_it_predicts(whole: Whole) -> None:
    """One edit after the other, on the network as it is then; all of them must run."""
    for dtype in (torch.float32, torch.float64):
        model, example = whole.model().to(dtype), (whole.inputs(1).to(dtype),)
        for edit in whole.edits:
            predicted = edit.predict(module_cost(model, example, edit.layer))
            edit.apply(model)
            agree(edit.layer, predicted, module_cost(model, example, edit.layer))


def costs_are_what_was_predicted(whole: Whole) -> None:
    """Each edit from the prediction of the last one; measured when all are done."""
    model, example = whole.model(), (whole.inputs(1),)
    expected: dict[str, LayerCost] = {}
    for edit in whole.edits:
        before = expected.get(edit.layer) or module_cost(whole.model(), example, edit.layer)
        expected[edit.layer] = edit.predict(before)
        edit.apply(model)
    for layer, predicted in expected.items():
        agree(layer, predicted, module_cost(model, example, layer))


def agree(layer: str, predicted: LayerCost, found: LayerCost) -> None:
    for axis in ("params", "macs", "bytes", "input", "output", "calls"):
        assert getattr(predicted, axis) == getattr(found, axis), f"{axis} of {layer}"


# ---------------------------------------------------------------- within a training


def begun(whole: Whole, optimizer: str) -> Run:
    model = whole.model().train()
    example = (whole.inputs(1),)
    made = OPTIMIZERS[optimizer](model)
    return start(model, whole.method(), example=example, optimizer=made, steps=STEPS)


def trained(whole: Whole, optimizer: str, *, stop: int | None = None) -> Run:
    """The plain loop; at step ``stop`` all is saved and a new process goes on."""
    run, x = begun(whole, optimizer), whole.inputs()
    labels = torch.arange(len(x)) % CLASSES
    with torch.random.fork_rng(devices=[]):
        for step in range(STEPS):
            if step == stop:
                run = again(run, whole, optimizer)
            torch.manual_seed(step)
            assert run.optimizer is not None
            run.optimizer.zero_grad()
            nn.functional.cross_entropy(run.model(x), labels).backward()
            run.before_step()
            run.optimizer.step()
            run.after_step()
    run.finish()
    return run


def again(old: Run, whole: Whole, optimizer: str) -> Run:
    assert old.optimizer is not None
    parts = old.state_dict(), old.model.state_dict(), old.optimizer.state_dict()
    saved = copy.deepcopy(parts)
    new = begun(whole, optimizer)
    assert new.optimizer is not None
    new.load_state_dict(saved[0])
    new.model.load_state_dict(saved[1])
    new.optimizer.load_state_dict(saved[2])
    return new


def trains_on_and_resumes(whole: Whole, optimizer: str) -> None:
    run = trained(whole, optimizer)
    assert run.optimizer is not None
    known = [id(p) for group in run.optimizer.param_groups for p in group["params"]]
    assert sorted(known) == sorted(id(p) for p in run.model.parameters())
    assert {*run.optimizer.state} <= {*run.model.parameters()}
    for stop in (EDITED - 1, EDITED, EDITED + 2):
        same_tensors(run.model, trained(whole, optimizer, stop=stop).model, f"resumed at {stop}")


def compresses_saves_and_loads(whole: Whole, folder: Path) -> None:
    x = whole.inputs(16)
    data, plan = (x, torch.arange(16) % CLASSES), Train(epochs=3, batch=8, lr=0.01, device="cpu")
    result = compress(whole.model(), data, whole.method(), train=plan)
    path = result.save(folder / "a.pliant")
    for dense in (lambda: whole.model(1), whole.model(1)):
        back = load(path, dense).eval()
        same_tensors(result.model, back, "loaded")
        with torch.no_grad():
            # Equal tensors; how they lie in memory may change the last bit of a convolution.
            assert torch.allclose(back(x), result.model(x), atol=1e-6)
        assert str(back) == str(result.model)
    rows = result.report.layers
    assert sum(row.after["params"] for row in rows) == result.report.after.params
    assert result.report.to_json() and markdown(result.report)


CHECKS = (comes_back_from_json, replays_without_data, draws_the_same_again,
          keeps_dtype_mode_and_frozen_weights, costs_what_it_predicts)  # fmt: skip
