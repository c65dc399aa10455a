"""Compresses inside the Trainer of Transformers, by a callback.

run = pliant.start(model, method, budget, example=example, steps=1000)
trainer = Trainer(
    model,
    TrainingArguments("out", max_steps=1000),
    train_dataset=dataset,
    callbacks=[PliantCallback(run)],
    compute_loss_func=loss_function(run),  # only for methods that use outputs
)
trainer.train()
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pliant.data import IGNORED
from pliant.drivers.check import (
    check_heard,
    check_one_device,
    check_served,
    check_steps,
    check_trainer,
)
from pliant.drivers.checkpoint import sealed, unsealed
from pliant.drivers.devices import agree
from pliant.drivers.score import scored
from pliant.drivers.settle import settle_run
from pliant.errors import ArtifactError, TrainingError, require
from pliant.run import Run

FILE = "pliant.pt"

if TYPE_CHECKING:
    from accelerate.optimizer import AcceleratedOptimizer

    _Callback = object
else:
    _Callback = require("transformers", "transformers").TrainerCallback
    AcceleratedOptimizer = require("accelerate", "transformers").optimizer.AcceleratedOptimizer


class PliantCallback(_Callback):
    """Calls a run's hooks from the Trainer of Transformers.

    The Trainer clips gradients (``max_grad_norm``, 1.0 unless you say otherwise) before its hook,
    so the method's penalty is not clipped. A method that chooses the data of epochs needs a Trainer
    whose ``get_train_dataloader`` returns ``run.batches()``, and ``max_steps=run.steps``. Its
    checkpoints get a file of the run's, from which
    ``restore`` resumes.

    Args:
        run: from ``pliant.start(..., steps=...)``; its model is the Trainer's or a part of it.

    A run that was started with a task, a loss or metrics, and with validation data, is scored at
    the end of every epoch: see its log.

    Raises:
        MethodError: the run was started without steps or epochs and its method needs them.
        DataError: what the run's task was given as labels does not fit.
    """

    def __init__(self, run: Run) -> None:
        check_steps(run)
        check_served(run)
        self.run = run
        self._scores = settle_run(run)
        self._edits = len(run.edits)
        self._parts = 1  # of a step: the batches over which a loss is divided

    def restore(self, checkpoint: str | Path) -> None:
        """Bring a fresh run to a checkpoint of the Trainer; its edits are replayed.

        Call it before the optimizer is made and before
        ``trainer.train(resume_from_checkpoint=checkpoint)``, which loads the weights.

        Raises:
            TrainingError: the folder holds no state of a run.
            ArtifactError: it is damaged.
        """
        path = Path(checkpoint) / FILE
        if not path.exists():
            raise TrainingError(
                f"{path} must hold the state of the run, but is not there; resume from a "
                "checkpoint that was written while compressing."
            )
        try:
            saved = unsealed(path)
        except Exception as error:  # torch.load raises what it likes on foreign bytes
            said = str(error) if isinstance(error, ArtifactError) else type(error).__name__
            raise ArtifactError(
                f"{path} must hold the state of the run, but cannot be read ({said}); resume from "
                "another checkpoint."
            ) from error
        self.run.load_state_dict(saved)
        self._edits = len(self.run.edits)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the run the Trainer's optimizer, so that its state follows every edit.

        Raises:
            TrainingError: the Trainer resumes and the run was not restored, or its settings do not
                serve the method.
            MethodError: the Trainer takes fewer steps than the run was started for.
        """
        if state.global_step != self.run.step:
            raise TrainingError(
                f"The Trainer begins at step {state.global_step}, but the run is at step "
                f"{self.run.step}; call PliantCallback.restore(checkpoint) before train()."
            )
        check_trainer(self.run, state.max_steps)
        self._check_settings(args, state)
        self._parts = args.gradient_accumulation_steps
        model = kwargs.get("model", self.run.model)
        self.run.hook(model.register_forward_hook(self._hear, with_kwargs=True))
        optimizer = kwargs.get("optimizer")
        if optimizer is not None:
            wrapped = isinstance(optimizer, AcceleratedOptimizer)
            self.run.optimizer = optimizer.optimizer if wrapped else optimizer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are complete."""
        check_heard(self.run, "pass Trainer(compute_loss_func=loss_function(run))")
        self.run.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Weights have moved."""
        agree(self.run.model, args.world_size, weights=False)
        self.run.after_step()
        self._check_edits(args)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One pass over the data is over."""
        agree(self.run.model, args.world_size, weights=False)
        self.run.after_epoch()
        if self._scores and self.run.data is not None:
            self.run.note(**scored(self.run, self.run.data))
        self._check_edits(args)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the run beside the Trainer's checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            (folder / FILE).write_bytes(sealed(self.run.state_dict()).getbuffer())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish the run; whether the budget is met is for the caller to see."""
        agree(self.run.model, args.world_size, weights=False)
        self.run.finish(strict=False)

    def _hear(self, model: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        """Take the loss that a model gives with its output, which is what trains it."""
        loss = output.get("loss") if model.training and isinstance(output, Mapping) else None
        if loss is not None:
            parts = self._parts if "num_items_in_batch" in kwargs else 1
            self.run.hear(parts * loss.detach(), output, kwargs)

    def _check_settings(self, args: Any, state: Any) -> None:
        """Refuse settings under which a hook would see what it must not, or not see the data."""
        adds = self.run.method.uses("penalty") or self.run.method.uses("before_step")
        if args.fp16 and not args.max_grad_norm and adds:
            raise TrainingError(
                f"{type(self.run.method).__name__} changes gradients, but in fp16 the Trainer "
                "leaves them scaled unless it clips: set max_grad_norm, to a large number if "
                "nothing is to be clipped, or use bf16."
            )
        if state.global_step and self.run.method.uses("epoch") and not args.ignore_data_skip:
            raise TrainingError(
                "run.batches() begins where the run stands, so the Trainer must skip nothing: set "
                "ignore_data_skip=True to resume."
            )

    def _check_edits(self, args: Any) -> None:
        edited, self._edits = len(self.run.edits) > self._edits, len(self.run.edits)
        if edited:
            check_one_device(args.world_size, "the Trainer works")


def loss_function(
    run: Run, criterion: Callable[..., Tensor] | None = None
) -> Callable[..., Tensor]:
    """Make the ``compute_loss_func`` of a Trainer, for methods that use the outputs.

    The batch that the method sees is what the network got, with the labels. In evaluation the
    loss is the task's. With gradient accumulation every batch counts by its labels.

    Args:
        run: the run of the callback.
        criterion: mean loss of (outputs, labels); the run's own if None, which is cross-entropy of
            the logits by default. A language model needs one that shifts its labels. For a method
            that weighs samples it takes ``reduction="none"`` too, and then gives a loss for each
            sample or label.
    """
    if criterion is not None:
        run.criterion = criterion
    seen: dict[str, Any] = {}

    def look(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        seen["inputs"] = (args, dict(kwargs))

    run.hook(run.model.register_forward_pre_hook(look, with_kwargs=True))

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        args, kwargs = seen.pop("inputs", ((), {}))
        batch = {**kwargs, "labels": labels} if kwargs else (*args, labels)
        if run.model.training:
            task = run.task_loss(outputs, batch, run.reduction)
            task = run.loss(task, _output(outputs, kwargs), batch)
        else:
            task = run.task_loss(outputs, batch)
        if num_items_in_batch is None:
            return task
        return task * ((labels != IGNORED).sum() / num_items_in_batch)

    return loss


def _output(outputs: Any, kwargs: Mapping[str, Any]) -> Any:
    """Give what a loop of one's own would: the logits, where the network got plain tensors."""
    found = outputs.get("logits") if isinstance(outputs, Mapping) else None
    return outputs if kwargs or found is None else found
