"""The training loop of `compress` and the command line, on Lightning Fabric."""

from pathlib import Path

from torch import nn

from pliant.data import Data, Train
from pliant.data.epochs import Epochs
from pliant.data.guess import task_loss
from pliant.data.splits import Split
from pliant.drivers.check import check_data, check_steps
from pliant.drivers.devices import fabric_of, fast_layout, own_randomness
from pliant.drivers.schedule import optimizer_of, rate
from pliant.drivers.score import Score, evaluate
from pliant.drivers.settle import settle
from pliant.drivers.training import SEARCH, Training, Watch
from pliant.errors import TrainingError
from pliant.run import Hooks, Run

__all__ = ["Score", "epochs_of", "evaluate", "fit", "optimizer_of", "rate"]


def fit(
    run: Run,
    data: Data,
    train: Train,
    *,
    folder: Path | None = None,
    resume: bool = False,
    watch: Watch | None = None,
    teacher: nn.Module | None = None,
) -> None:
    """Train a run's network with its method, finish the run, and fine-tune the result.

    First come `train.epochs` with the hooks of the method, then `run.finish(strict=False)`, then
    `train.finetune` plain epochs with an optimizer and a schedule of their own. Every epoch adds
    a row to the run's log: loss, lr, seconds, and accuracy and val_loss if there is a validation
    split. Random numbers of the network (dropout) are seeded by the run's seed; the caller's
    random state stays untouched. Networks with 2-d convolutions are trained in channels_last,
    which is faster, and come back in the layout in which they came.

    The gradient is clipped before the method adds its own, so a penalty is never clipped.

    With `train.devices` above 1, start this in every process (torchrun): batches are divided,
    gradients averaged; all take the statistics of rank 0 before the method acts on a step, and
    its weights after each epoch.

    Args:
        run: from `start(..., steps=...)` with the steps of `train.epochs`.
        data: its training split, and a validation split for the log.
        train: how long and how.
        folder: where a checkpoint is kept, replaced after every epoch and, if asked, every
            `train.checkpoint_every` steps. None keeps none.
        resume: go on from the checkpoint of `folder`, if there is one; the final weights are
            those of an undisturbed run.
        watch: called after every step with phase, step, steps, epoch, epochs, loss, lr and
            seconds_left.
        teacher: the dense network, for `train.distill`.

    Raises:
        DataError: data and network do not fit.
        ModelError: the network fails in forward.
        MethodError: the run was started for another number of steps.
        TrainingError: loss or weights are not finite, the checkpoint is another run's, or
            processes or teacher are missing.
        KeyboardInterrupt: after the checkpoint was written.
    """
    if not train.epochs and not train.finetune:
        run.finish(strict=False)
        return
    check_data(run.model, data)
    used: list[Split] = ["train", "val"] if data.has("val") else ["train"]
    if run.criterion is task_loss:
        run.task = settle(run.task, run.model, data, used, trains=True)
    fabric = fabric_of(train)
    world = {"rank": fabric.global_rank, "world": fabric.world_size}
    run.epochs = epochs_of(run.method, data, train, seed=run.seed, **world)
    per_epoch = data.steps(train.batch, fabric.world_size)
    steps = (run.epochs.steps, train.steps(per_epoch, finetune=True))
    if train.distill and teacher is None:
        raise TrainingError(
            "Distillation needs the dense network, but none came; pass teacher=, or distill=0."
        )
    check_steps(run, steps[SEARCH])
    training = Training(
        run, data, train, fabric, folder, watch, teacher, run.epochs, per_epoch, steps
    )
    with fast_layout(run.model), own_randomness(run.seed + fabric.global_rank, fabric.device):
        try:
            training.begin(resume=resume)
            training.go()
        except KeyboardInterrupt:
            if training.clean:
                training.save()
            raise
        finally:
            run.close()


def epochs_of(
    method: Hooks[Run], data: Data, train: Train, *, seed: int, rank: int = 0, world: int = 1
) -> Epochs:
    """Plan the epochs of a training with a method: what each trains on, and all its steps."""
    change = method.epoch if method.uses("epoch") else None
    return Epochs(data, train.epochs, train.batch, seed, change, rank, world)
