"""Compresses inside Lightning's Trainer, by a callback.

    run = pliant.start(net, method, budget, data=data, steps=1000)

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = run.model

        def training_step(self, batch, index):
            output = self.net(batch[0])
            loss = cross_entropy(output, batch[1], reduction=run.reduction)
            return run.loss(loss, output, batch)  # needed by methods that use outputs, else free

    trainer = Trainer(max_steps=1000, callbacks=[PliantCallback(run)])
    trainer.fit(Module(), loader)

Both ``lightning.pytorch`` and the standalone ``pytorch_lightning`` are served: import yours first.
"""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.utils.hooks import RemovableHandle

from pliant.drivers.check import (
    check_heard,
    check_one_device,
    check_served,
    check_steps,
    check_trainer,
)
from pliant.drivers.devices import agree
from pliant.drivers.score import scored
from pliant.drivers.settle import settle_run
from pliant.errors import TrainingError, require
from pliant.run import Run

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _base() -> Any:
    """Return the Callback of the package in use; with both in use, a child of both."""
    used = [name for name in _PACKAGES if name in sys.modules]
    kinds = [require(name, "lightning").Callback for name in used or _PACKAGES[:1]]
    return type("Callback", tuple(dict.fromkeys(kinds)), {})


if TYPE_CHECKING:
    _Callback = object
else:
    _Callback = _base()


class PliantCallback(_Callback):
    """Calls a run's hooks from Lightning's Trainer.

    With several optimizers, which Lightning steps by hand, so are the run's: call
    ``run.before_step()`` before and ``run.after_step()`` after their steps in ``training_step``.

    A method that chooses the data of epochs needs ``trainer.fit(module, run.batches())``.

    Lightning clips gradients after its hooks, so there the method's penalty is clipped too; in
    the plain loop and in Transformers it is not.

    A checkpoint of the Trainer holds the run. To resume, start the run anew with the same
    arguments and call ``trainer.fit(..., ckpt_path=...)``: edits are replayed just before the
    Trainer loads weights into the changed shapes. Checkpoints at the end of an epoch give the
    same result as an undisturbed training if the loader does; Lightning itself does not repeat
    the order of batches within an epoch.

    Args:
        run: from ``pliant.start(..., steps=...)``; its model is the LightningModule or a part.

    A run that was started with a task, a loss or metrics, and with validation data, is scored at
    the end of every epoch: see its log.

    Raises:
        MethodError: the run was started without steps or epochs and its method needs them.
        DataError: what the run's task was given as labels does not fit.
    """

    def __init__(self, run: Run) -> None:
        check_steps(run)
        check_served(run)
        super().__init__()
        self.run = run
        self._scores = settle_run(run)
        self._steps = 0  # of the Trainer, at the last hook
        self._taken = run.step  # of the run, at the last hook
        self._by_hand = False  # whether training_step calls the run's steps
        self._edits = len(run.edits)
        self._loading: RemovableHandle | None = None  # of the hook that replays edits

    @property
    def state_key(self) -> str:
        """Name this callback in a checkpoint, whichever package it is a child of."""
        return "PliantCallback"

    def state_dict(self) -> dict[str, Any]:
        """Return the run, for the Trainer's checkpoint."""
        return self.run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Bring the run to a saved point; a second time changes nothing."""
        self.run.load_state_dict(state_dict)
        self._edits, self._taken = len(self.run.edits), self.run.step

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Ask to be called before weights are loaded: the last moment to replay edits."""
        self._loading = pl_module.register_load_state_dict_pre_hook(
            lambda *_: self._replay(trainer) if trainer.ckpt_path else None
        )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave no hook in the LightningModule."""
        self._forget()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Give the run the Trainer's optimizers, so that their state follows every edit.

        Raises:
            MethodError: the Trainer takes fewer steps than the run was started for.
        """
        self._forget()
        if not trainer.fast_dev_run:
            check_trainer(self.run, trainer.estimated_stepping_batches)
        self.run.optimizer = list(trainer.optimizers) or self.run.optimizers
        self._steps, self._by_hand = trainer.global_step, len(trainer.optimizers) > 1

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Gradients are complete."""
        check_heard(self.run, "return run.loss(loss, output, batch) from training_step")
        if not self._by_hand:
            self.run.before_step()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Weights have moved, unless gradients are still being accumulated.

        Raises:
            TrainingError: there are several optimizers, and the run's steps were not called.
        """
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        if self.run.first.heard is None and isinstance(outputs, Mapping) and "loss" in outputs:
            self.run.hear(outputs["loss"])
        if not self._by_hand:
            agree(self.run.model, trainer.world_size, weights=False)
            self.run.after_step()
        elif self.run.step == self._taken:
            raise TrainingError(
                "Lightning steps several optimizers by hand, so its callbacks cannot tell when all "
                "gradients are there: call run.before_step() before the optimizers' steps in "
                "training_step, and run.after_step() after them."
            )
        self._taken = self.run.step
        self._check_edits(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """One pass over the data is over."""
        agree(self.run.model, trainer.world_size, weights=False)
        self.run.after_epoch()
        if self._scores and self.run.data is not None:
            self.run.note(**scored(self.run, self.run.data))
        self._check_edits(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Finish the run; whether the budget is met is for the caller to see."""
        agree(self.run.model, trainer.world_size, weights=False)
        self.run.finish(strict=False)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave no hook in the network."""
        self.run.close()
        self._forget()

    def _forget(self) -> None:
        if self._loading is not None:
            self._loading.remove()

    def _replay(self, trainer: Any) -> None:
        saved = trainer.strategy.load_checkpoint(trainer.ckpt_path).get("callbacks", {})
        if self.state_key not in saved:
            raise TrainingError(
                f"{trainer.ckpt_path} must hold the state of PliantCallback, but was written "
                "without it; resume from one that was written while compressing."
            )
        self.load_state_dict(saved[self.state_key])

    def _check_edits(self, trainer: Any) -> None:
        edited, self._edits = len(self.run.edits) > self._edits, len(self.run.edits)
        if not edited:
            return
        check_one_device(trainer.world_size, "Lightning trains")
        for callback in trainer.callbacks:
            kinds = {kind.__name__ for kind in type(callback).__mro__}
            if kinds & {"WeightAveraging", "StochasticWeightAveraging"}:
                raise TrainingError(
                    f"A layer was replaced, but the average of the weights that "
                    f"{type(callback).__name__} keeps still has the old one. Leave the callback "
                    "out, or average by a copy of your own that the run knows: "
                    "pliant.start(..., copies=[average])."
                )
