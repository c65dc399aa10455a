"""One toy trained in four ways with one seed: every tensor at the end is the same, bit for bit."""

import copy
import importlib
import logging
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pliant.compose import together
from pliant.data import Data, Epoch, Train, unpack
from pliant.drivers.check import check_data
from pliant.drivers.loop import evaluate, fit, optimizer_of, rate
from pliant.edits import Factor
from pliant.errors import DataError, MethodError, MissingExtraError, ModelError, TrainingError
from pliant.method import Method, uses
from pliant.run import Run, start

SAMPLES, BATCH, EPOCHS = 32, 8, 3
STEPS = EPOCHS * SAMPLES // BATCH
SGD = Train(epochs=EPOCHS, batch=BATCH, lr=0.05, warmup=0.2, device="cpu")
ADAMW = Train(epochs=EPOCHS, batch=BATCH, lr=0.01, optimizer="adamw", device="cpu")


# ------------------------------------------------------------------ methods that try every hook


@dataclass(frozen=True)
class Nothing(Method):
    """Does nothing."""


@dataclass(frozen=True)
class Shrink(Method):
    """A penalty on all kernels, a gradient that is masked, a projection after every step."""

    def prepare(self, run: Run) -> None:
        run.state["steps"] = torch.zeros(())

    def penalty(self, run: Run) -> Tensor:
        kernels = [p for p in run.model.parameters() if p.dim() > 1]
        return 0.01 * torch.stack([kernel.square().sum() for kernel in kernels]).sum()

    def before_step(self, run: Run) -> None:
        grad = run.model.get_parameter("head.weight").grad
        assert grad is not None
        grad[0] = 0

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        run.state["steps"] += 1
        weight = run.model.get_parameter("first.weight")
        weight.copy_(weight.sign() * (weight.abs() - 1e-3).clamp(min=0))

    def after_epoch(self, run: Run) -> None:
        run.note(kernel=float(run.model.get_parameter("first.weight").detach().abs().sum()))


@dataclass(frozen=True)
class Midway(Method):
    """Factorizes a layer in the middle of training and another one at the end."""

    def after_step(self, run: Run) -> None:
        if run.step == run.steps // 2:
            run.apply(Factor("second", "tucker2", (4, 5)))

    def finalize(self, run: Run) -> None:
        run.apply(Factor("third", "spatial", (4,)))


@dataclass(frozen=True)
class Entropy(Method):
    """Adds the negative entropy of the outputs to the loss, and a term of inputs and labels."""

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        inputs, labels = batch
        shares = output.log_softmax(1)
        scale = 1 + inputs.square().mean() + labels.float().mean()
        return loss + 0.1 * (shares.exp() * shares).sum(1).mean() * scale


@dataclass(frozen=True)
class Ahead(Method):
    """Two batches: the gradient step on one of them shall help another (order 2 or 1)."""

    alpha: float = 0.1
    order: int = 2

    def refuse(self, run: Run) -> None:
        if not run.has_inputs:
            raise DataError("Ahead draws a second batch at every step: pass data.")

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        inputs, labels = run.draw(len(unpack(batch)[1]))
        names, weights = zip(*run.model.named_parameters(), strict=True)
        grads = torch.autograd.grad(loss, weights, create_graph=self.order == 2, retain_graph=True)
        moved = [w - self.alpha * g for w, g in zip(weights, grads, strict=True)]
        apart = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
        values = {**apart, **dict(zip(names, moved, strict=True))}
        args, named = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        return loss + run.criterion(functional_call(run.model, values, args, named), labels)


@dataclass(frozen=True)
class Growing(Method):
    """Data by epoch: a share and a batch that grow, a rate that falls; then chosen rows."""

    def epoch(self, epoch: Epoch, data: Data) -> Epoch:
        if epoch.number == 2:
            rows = torch.arange(0, data.rows(), 2)
            return replace(epoch, samples=rows, batch=epoch.batch // 2, rate=0.25)
        if epoch.number == 1:
            return replace(epoch, batch=2 * epoch.batch, rate=0.5)
        return replace(epoch, samples=0.5)


@dataclass(frozen=True)
class Doubting(Method):
    """Weighs samples by what they lose beside the running mean of what samples lost."""

    def prepare(self, run: Run) -> None:
        run.state["mean"] = torch.ones(())

    def weigh(self, run: Run, losses: Tensor, output: Any, batch: Any) -> Tensor:
        run.state["mean"] += 0.1 * (losses.mean() - run.state["mean"])
        return (losses < run.state["mean"]).to(losses.dtype) + 0.5


# ------------------------------------------------------------------ the toy


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 8, 3, padding=1, stride=2, bias=False)
        self.last = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm(self.first(images)).relu()
        hidden = self.last(self.third(self.second(hidden).relu())).relu()
        return self.head(hidden.mean((2, 3)))


def contiguous() -> Net:
    torch.manual_seed(0)
    return Net()


def net() -> Net:
    """The toy. The loop trains convolutions in channels_last, whose sums have another order."""
    return contiguous().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def samples(count: int = SAMPLES, seed: int = 1) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = torch.randn(count, 3, 6, 6, generator=noise) + labels.view(-1, 1, 1, 1) * 0.3
    return images, labels


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*samples()), batch_size=BATCH)


class Named(Dataset[dict[str, Tensor]]):
    """The samples as the Trainer of Transformers wants them."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        images, labels = samples()
        return {"images": images[row], "labels": labels[row]}


def begin(method: Method, model: nn.Module, accumulate: int = 1, data: Data | None = None) -> Run:
    """Start a run; one that chooses its data is told of the epochs."""
    told: dict[str, Any] = {"steps": STEPS // accumulate}
    if uses(method, "epoch"):
        told = {"epochs": EPOCHS, "batch": BATCH}
    data = data or Data(samples() if uses(method, "epoch") else loader())
    return start(model, method, example=(torch.zeros(1, 3, 6, 6),), data=data, seed=3, **told)


# ------------------------------------------------------------------ the four ways


def plain(method: Method, train: Train, accumulate: int = 1) -> Run:
    """The hand-written loop that the documentation shows."""
    run = begin(method, net(), accumulate)
    run.optimizer = optimizer = optimizer_of(run.model, train)
    run.model.train()
    for _ in range(EPOCHS):
        for number, batch in enumerate(run.batches() if run.epochs else loader(), 1):
            inputs, labels = batch
            output = run.model(inputs)
            loss = F.cross_entropy(output, labels, reduction=run.reduction)
            loss = run.loss(loss, output, batch)
            (loss / accumulate).backward()
            if number % accumulate:
                continue
            if train.clip is not None:
                nn.utils.clip_grad_norm_(run.model.parameters(), train.clip)
            run.before_step()
            for group in optimizer.param_groups:
                group["lr"] = rate(train, run.step, run.steps)
            optimizer.step()
            run.after_step()
            optimizer.zero_grad()
        run.after_epoch()
    run.finish(strict=False)
    return run


def loop(method: Method, train: Train, accumulate: int = 1) -> Run:
    run = begin(method, net())
    assert run.data is not None
    fit(run, run.data, train)
    return run


def schedule(run: Run, train: Train) -> tuple[torch.optim.Optimizer, LambdaLR]:
    optimizer = optimizer_of(run.model, train)
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    return optimizer, LambdaLR(optimizer, lambda step: rate(train, step, run.steps))


def lightning(
    method: Method,
    train: Train,
    accumulate: int = 1,
    package: str = "lightning.pytorch",
    **more: Any,
) -> Run:
    pl = pytest.importorskip(package)
    from pliant.drivers.lightning import PliantCallback

    run = begin(method, net(), accumulate)

    class Lit(pl.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = run.model

        def training_step(self, batch: Any, index: int) -> Tensor:
            output = self.net(batch[0])
            loss = F.cross_entropy(output, batch[1], reduction=run.reduction)
            return run.loss(loss, output, batch)

        def configure_optimizers(self) -> Any:
            optimizer, scheduler = schedule(run, train)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    logging.getLogger(package).setLevel(logging.ERROR)
    settings: dict[str, Any] = {"max_epochs": EPOCHS, "enable_checkpointing": False} | more
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=train.clip,
        callbacks=[PliantCallback(run), *settings.pop("callbacks", [])],
        **settings,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Lit(), run.batches() if run.epochs else loader(), ckpt_path=ckpt_path)
    return run


class Labelled(nn.Module):
    """What the Trainer wants: inputs by name, the loss in the output."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(images)
        loss = {} if labels is None else {"loss": F.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def asks(method: Method) -> bool:
    return uses(method, "loss") or uses(method, "weigh")


def transformers(
    method: Method, train: Train, accumulate: int = 1, folder: Any = "unused", resume: Any = None
) -> Run:
    hf = pytest.importorskip("transformers")
    from pliant.drivers.hf import PliantCallback, loss_function

    data = Data(Named()) if uses(method, "epoch") else None
    run = begin(method, net() if folder == "unused" else contiguous(), accumulate, data)
    callback = PliantCallback(run)
    if resume is not None:
        callback.restore(resume)
    rows = [{"images": x, "labels": y} for x, y in zip(*samples(), strict=True)]

    class Ordered(hf.Trainer):  # type: ignore[name-defined]
        def get_train_dataloader(self) -> Any:
            loader = DataLoader(rows, batch_size=BATCH)  # type: ignore[arg-type]
            return run.batches() if run.epochs else loader

    arguments = hf.TrainingArguments(
        str(folder),
        num_train_epochs=EPOCHS,
        max_steps=run.steps if run.epochs else -1,
        ignore_data_skip=run.epochs is not None,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=train.clip or 0.0,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no" if folder == "unused" else "steps",
        save_steps=STEPS // 2 + 1,
    )
    trainer = Ordered(
        Labelled(run.model),
        arguments,
        train_dataset=rows,
        callbacks=[callback],
        optimizers=schedule(run, train),
        compute_loss_func=loss_function(run) if asks(method) else None,
    )
    trainer.remove_callback(hf.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return run


Way = Callable[[Method, Train, int], Run]
WAYS: dict[str, Way] = {"loop": loop, "lightning": lightning, "transformers": transformers}


def assert_same(one: Run, other: Run) -> None:
    first, second = one.model.state_dict(), other.model.state_dict()
    assert list(first) == list(second)
    wrong = [name for name in first if not torch.equal(first[name], second[name])]
    assert not wrong, (
        f"{wrong} differ, {wrong[0]} by {(first[wrong[0]] - second[wrong[0]]).abs().max()}"
    )
    assert (one.step, one.epoch, one.finished) == (other.step, other.epoch, other.finished)
    assert one.edits == other.edits
    assert str(one.state) == str(other.state)


CASES = {
    "nothing": (Nothing(), SGD),
    "penalty and projection": (Shrink(), SGD),
    "factor midway, momentum": (Midway(), SGD),
    "factor midway, adamw": (Midway(), ADAMW),
    "penalty, adamw": (Shrink(), ADAMW),
    "loss": (Entropy(), SGD),
    "two batches": (Ahead(), SGD),
    "two batches, first order": (Ahead(order=1), ADAMW),
    "data by epoch": (Growing(), SGD),
    "data by epoch, adamw": (Growing(), ADAMW),
    "weighed samples": (Doubting(), SGD),
    "all at once": (together(Doubting(), Growing(), Ahead(), Midway(), Shrink()), SGD),
    "clip": (Entropy(), Train(epochs=EPOCHS, batch=BATCH, lr=0.05, clip=0.1, device="cpu")),
}


@pytest.mark.slow  # the first case of a trainer pays for its import
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_the_four_ways_agree_to_the_last_bit(case: str, way: str) -> None:
    method, train = CASES[case]
    untouched = net().state_dict()
    expected, run = plain(method, train), WAYS[way](method, train, 1)
    assert not torch.equal(untouched["head.weight"], run.model.state_dict()["head.weight"])
    steps = expected.steps if uses(method, "epoch") else STEPS
    assert run.step == steps and run.epoch == EPOCHS and run.finished
    assert steps == (2 + 2 + 4 if uses(method, "epoch") else STEPS)
    assert_same(expected, run)


@pytest.mark.slow  # two trainers
@pytest.mark.parametrize("way", ["lightning", "transformers"])
@pytest.mark.parametrize(
    "method",
    [Shrink(), Midway(), Entropy(), Doubting(), Ahead()],
    ids=lambda m: type(m).__name__,
)
def test_accumulation_agrees_where_a_trainer_has_it(method: Method, way: str) -> None:
    assert_same(plain(method, SGD, 2), WAYS[way](method, SGD, 2))


@pytest.mark.parametrize("way", ["loop", "transformers"])
def test_clipping_leaves_the_penalty_alone(way: str) -> None:
    """Lightning clips after its hook, so there the penalty is clipped too: it cannot be told."""
    train = Train(epochs=EPOCHS, batch=BATCH, lr=0.05, clip=0.1, device="cpu")
    assert_same(plain(Shrink(), train), WAYS[way](Shrink(), train, 1))


def test_standalone_pytorch_lightning_agrees() -> None:
    assert_same(plain(Midway(), SGD), lightning(Midway(), SGD, package="pytorch_lightning"))


@pytest.mark.parametrize("package", ["lightning", "hf"])
def test_processes_agree_on_statistics_before_the_method_acts(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip({"lightning": "lightning.pytorch", "hf": "transformers"}[package])
    driver = importlib.import_module(f"pliant.drivers.{package}")
    run = begin(Nothing(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    told: list[Any] = []

    def tell(tensor: Tensor, source: int) -> None:
        told.append(tensor.data_ptr())

    monkeypatch.setattr(torch.distributed, "broadcast", tell)
    for hook in ("after_step", "after_epoch", "finish"):
        monkeypatch.setattr(run, hook, lambda hook=hook, **_: told.append(hook))
    callback, world = driver.PliantCallback(run), SimpleNamespace(world_size=2, global_step=1)
    if package == "lightning":
        callback.on_train_batch_end(world, None, None, None, 0)
        callback.on_train_epoch_end(world, None)
        callback.on_train_end(world, None)
    else:
        callback.on_optimizer_step(world, None, None)
        callback.on_epoch_end(world, None, None)
        callback.on_train_end(world, None, None)
    statistics = [buffer.data_ptr() for buffer in run.model.buffers()]
    assert told == [*statistics, "after_step", *statistics, "after_epoch", *statistics, "finish"]


def test_memory_layout_is_the_loops_own_affair() -> None:
    """A contiguous model comes back contiguous, with the same weights up to rounding."""
    run = begin(Midway(), contiguous())
    fit(run, Data(loader()), SGD)
    expected = plain(Midway(), SGD).model.state_dict()
    for name, tensor in run.model.state_dict().items():
        assert tensor.is_contiguous()
        assert torch.allclose(tensor, expected[name], atol=1e-4), name


# ------------------------------------------------------------------ the trainers' own resumption


@pytest.mark.slow  # three trainings
def test_lightning_resumes_across_an_edit(tmp_path: Any) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, save_top_k=-1, save_on_train_epoch_end=True)

    for method in (Midway(), Shrink()):
        whole = lightning(method, SGD, enable_checkpointing=True, callbacks=[saver()])
        path = tmp_path / f"epoch=1-step={STEPS // 2 + 2}.ckpt"
        resumed = lightning(method, SGD, ckpt_path=path)
        assert_same(whole, resumed)
        for file in tmp_path.iterdir():
            file.unlink()


@pytest.mark.slow  # two trainings
def test_transformers_resumes_across_an_edit(tmp_path: Any) -> None:
    whole = transformers(Midway(), SGD, folder=tmp_path)
    saved = tmp_path / f"checkpoint-{STEPS // 2 + 1}"
    resumed = transformers(Midway(), SGD, folder=tmp_path, resume=saved)
    assert_same(whole, resumed)


@pytest.mark.slow  # three trainings
def test_lightning_resumes_within_an_epoch_that_a_method_chose(tmp_path: Any) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1)
    whole = lightning(Growing(), SGD, enable_checkpointing=True, callbacks=[saver])
    for path in ("epoch=0-step=1.ckpt", "epoch=2-step=6.ckpt"):
        assert_same(whole, lightning(Growing(), SGD, ckpt_path=tmp_path / path))


@pytest.mark.slow  # two trainings
def test_transformers_resumes_within_an_epoch_that_a_method_chose(tmp_path: Any) -> None:
    whole = transformers(Growing(), SGD, folder=tmp_path)
    saved = tmp_path / f"checkpoint-{STEPS // 2 + 1}"  # of 8: within the last epoch
    assert_same(whole, transformers(Growing(), SGD, folder=tmp_path, resume=saved))


def test_trainers_refuse_what_they_cannot_give() -> None:
    """Epochs that nobody counted, a loss that nobody asked about, a training that ends early."""
    pytest.importorskip("transformers")
    from pliant.drivers.hf import PliantCallback as OfTransformers

    example = (torch.zeros(1, 3, 6, 6),)
    with pytest.raises(MethodError, match=r"Growing chooses .* run\.batches\(\)"):
        OfTransformers(start(net(), Growing(), example=example, steps=4))
    with pytest.raises(MethodError, match=r"steps=5"):
        OfTransformers(begin(Shrink(), net())).on_train_begin(
            SETTINGS, SimpleNamespace(global_step=0, max_steps=5), None
        )
    with pytest.raises(TrainingError, match="max_grad_norm"):
        OfTransformers(begin(Shrink(), net())).on_train_begin(
            SimpleNamespace(**{**vars(SETTINGS), "fp16": True}),
            SimpleNamespace(global_step=0, max_steps=STEPS),
            None,
        )
    with pytest.raises(MethodError, match=r"compute_loss_func=loss_function\(run\)"):
        OfTransformers(begin(Entropy(), net())).on_pre_optimizer_step(None, None, None)


SETTINGS = SimpleNamespace(fp16=False, max_grad_norm=0.0, ignore_data_skip=False)


def test_lightning_refuses_what_it_cannot_give() -> None:
    pl = pytest.importorskip("lightning.pytorch")
    from pliant.drivers.lightning import PliantCallback

    with pytest.raises(MethodError, match=r"Growing chooses .* run\.batches\(\)"):
        PliantCallback(start(net(), Growing(), example=(torch.zeros(1, 3, 6, 6),), steps=4))
    with pytest.raises(MethodError, match="steps=4"):
        lightning(Shrink(), SGD, max_epochs=1)

    class Deaf(pl.LightningModule):  # type: ignore[name-defined]
        def __init__(self, run: Run) -> None:
            super().__init__()
            self.net = run.model

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    for method, data, sentence in (
        (Entropy(), None, r"return run\.loss\("),
        (Growing(), None, r"take the batches of each epoch from run\.batches\(\)"),
    ):
        run = begin(method, net(), data=data)
        trainer = pl.Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            enable_checkpointing=False,
            callbacks=[PliantCallback(run)],
            **quiet,
        )
        with warnings.catch_warnings(), pytest.raises(MethodError, match=sentence):
            warnings.simplefilter("ignore")
            trainer.fit(Deaf(run), loader())
        assert run.step == 0 and not run.model._forward_hooks


@pytest.mark.parametrize("by_hand", [True, False])
def test_lightning_with_two_optimizers(by_hand: bool) -> None:
    """Lightning steps them by hand, so the run's steps are called by hand; if not, it says so."""
    pl = pytest.importorskip("lightning.pytorch")
    from pliant.drivers.lightning import PliantCallback

    run = begin(Midway(), net())

    class Two(pl.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = run.model, False

        def training_step(self, batch: Any, index: int) -> None:
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            optimizers = self.optimizers()
            for each in optimizers:
                each.zero_grad()
            self.manual_backward(loss)
            if by_hand:
                run.before_step()
            for each in optimizers:
                each.step()
            if by_hand:
                run.after_step()

        def configure_optimizers(self) -> Any:
            body = [p for n, p in self.net.named_parameters() if not n.startswith("head")]
            return [
                torch.optim.SGD(body, 0.05, momentum=0.9),
                torch.optim.Adam(self.net.head.parameters(), 0.01),
            ]

    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[PliantCallback(run)],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not by_hand:
            with pytest.raises(TrainingError, match=r"call run\.before_step\(\)"):
                trainer.fit(Two(), loader())
            return
        trainer.fit(Two(), loader())
    assert run.step == STEPS and run.finished and len(run.edits) == 2
    held = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
    assert {id(p) for p in run.model.parameters() if p.grad is not None} <= held


def test_lightning_refuses_an_average_that_cannot_follow() -> None:
    pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import WeightAveraging

    with pytest.raises(TrainingError, match="WeightAveraging keeps still has the old"):
        lightning(Midway(), SGD, callbacks=[WeightAveraging()])


def test_lightning_refuses_a_checkpoint_without_the_run(tmp_path: Any) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    path = tmp_path / "foreign.ckpt"
    state = {f"net.{name}": tensor for name, tensor in net().state_dict().items()}
    torch.save(
        {"state_dict": state, "callbacks": {}, "pytorch-lightning_version": pl.__version__}, path
    )
    with pytest.raises(TrainingError, match="PliantCallback"):
        lightning(Midway(), SGD, ckpt_path=path)


def test_transformers_refuses_to_resume_without_the_run(tmp_path: Any) -> None:
    pytest.importorskip("transformers")
    from pliant.drivers.hf import PliantCallback

    callback = PliantCallback(begin(Midway(), net()))
    with pytest.raises(TrainingError, match="must hold the state"):
        callback.restore(tmp_path)
    with pytest.raises(TrainingError, match="restore"):
        callback.on_train_begin(None, SimpleNamespace(global_step=3), None)


@pytest.mark.parametrize(
    ("driver", "package"), [("lightning", "lightning.pytorch"), ("hf", "transformers")]
)
def test_a_missing_trainer_names_the_extra(
    driver: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, f"pliant.drivers.{driver}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "pytorch_lightning", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install .pliant\["):
        importlib.import_module(f"pliant.drivers.{driver}")


@pytest.mark.slow  # a fresh interpreter imports torch
def test_the_loop_imports_no_trainer() -> None:
    code = (
        "import sys, pliant, pliant.drivers.loop\n"
        "heavy = {'lightning', 'pytorch_lightning', 'lightning_fabric', 'transformers'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_trainers_refuse_a_run_without_steps() -> None:
    for module, extra in (("lightning", "lightning"), ("hf", "transformers")):
        pytest.importorskip(extra)
        driver = __import__(f"pliant.drivers.{module}", fromlist=["PliantCallback"])
        run = start(net(), Shrink(), example=(torch.zeros(1, 3, 6, 6),))
        with pytest.raises(MethodError, match="steps="):
            driver.PliantCallback(run)


# ------------------------------------------------------------------ the loop: schedule, log, score


def test_rate_is_a_function_of_the_step() -> None:
    cosine = Train(lr=1.0, warmup=0.1)
    assert rate(cosine, 0, 100) == pytest.approx(0.1)
    assert rate(cosine, 9, 100) == pytest.approx(1.0)
    assert rate(cosine, 55, 100) == pytest.approx(0.5)
    assert rate(cosine, 99, 100) < 0.001
    steps = Train(lr=1.0, schedule="step")
    assert [rate(steps, at, 100) for at in (0, 49, 50, 75)] == pytest.approx([1, 1, 0.1, 0.01])
    assert rate(Train(lr=1.0, schedule="constant"), 99, 100) == 1.0


def test_the_loop_logs_every_epoch_and_shows_progress() -> None:
    run = begin(Shrink(), net())
    seen: list[dict[str, Any]] = []
    data = Data(samples(), samples(12, seed=2), classes=4)
    train = Train(epochs=EPOCHS, finetune=1.5, batch=BATCH, lr=0.05, device="cpu")
    fit(run, data, train, watch=seen.append)
    rows = [row for row in run.log if "loss" in row]
    assert [row["phase"] for row in rows] == ["search"] * 3 + ["finetune"] * 2
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 18]
    assert all({"accuracy", "val_loss", "lr", "seconds"} <= set(row) for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert len(seen) == STEPS + 6
    assert seen[0]["steps"] == STEPS and seen[-1]["epochs"] == 1.5
    assert set(seen[0]) == {
        "phase", "step", "steps", "epoch", "epochs", "loss", "lr", "seconds_left",
    }  # fmt: skip
    assert seen[-1]["seconds_left"] == 0


def test_evaluate_scores_and_restores_flags() -> None:
    model = net()
    model.norm.eval()
    images, labels = samples()
    score = evaluate(model, Data(val=(images, labels)), batch=5)
    assert model.training and not model.norm.training
    with torch.no_grad():
        output = copy.deepcopy(model).eval()(images)
    assert score.accuracy == (output.argmax(1) == labels).float().mean().item()
    assert score.loss == pytest.approx(F.cross_entropy(output, labels).item(), rel=1e-5)


def test_evaluate_takes_logits_by_name_and_regression() -> None:
    images, labels = samples()
    named = evaluate(Labelled(net()), Data(val=[{"images": images, "labels": labels}]))
    assert named == evaluate(net(), Data(val=(images, labels)))
    numbers = evaluate(nn.Flatten(), Data(val=[(torch.ones(2, 3), torch.zeros(2, 3))]))
    assert math.isnan(numbers.accuracy) and numbers.loss == 1.0


def test_distillation_follows_the_teacher() -> None:
    train = Train(epochs=0, finetune=3, batch=BATCH, lr=0.05, distill=1.0, device="cpu")
    run = start(net(), Nothing(), example=(torch.zeros(1, 3, 6, 6),))
    with pytest.raises(TrainingError, match="teacher"):
        fit(run, Data(samples()), train)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    images = samples()[0]

    def gap() -> float:
        with torch.no_grad():
            student = run.model(images).log_softmax(1)
            return float(F.kl_div(student, teacher(images).softmax(1), reduction="batchmean"))

    far = gap()
    fit(run, Data(samples()), train, teacher=teacher)
    assert gap() < far
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_bf16_trains() -> None:
    run = begin(Midway(), net())
    train = Train(epochs=EPOCHS, batch=BATCH, lr=0.05, precision="bf16-mixed", device="cpu")
    fit(run, Data(samples()), train)
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
    assert run.log[-1]["loss"] < run.log[0]["loss"]


# ------------------------------------------------------------------ the loop: refusals


def test_bad_data_is_refused_before_training() -> None:
    images, labels = samples()
    run = begin(Nothing(), net())
    for data, error, word in (
        (Data((images, labels + 3)), DataError, "0..3"),
        (Data((images * math.nan, labels)), DataError, "finite"),
        (Data((images[:, :2], labels)), ModelError, r"\(1, 2, 6, 6\)"),
        (Data(), DataError, "train"),
    ):
        with pytest.raises(error, match=word):
            fit(run, data, SGD)
    assert run.step == 0
    check_data(run.model, Data((images, labels)))


def test_no_epochs_finish_the_run_without_data() -> None:
    run = start(net(), Midway(), example=(torch.zeros(1, 3, 6, 6),))
    fit(run, Data(), Train(epochs=0))
    assert run.finished and [edit.layer for edit in run.edits] == ["third"]


def test_a_frozen_network_is_refused() -> None:
    model = net().requires_grad_(False)
    with pytest.raises(ModelError, match="require gradients"):
        fit(begin(Nothing(), model), Data(samples()), SGD)


def test_a_loader_that_gives_too_little_is_refused() -> None:
    class Short(DataLoader[Any]):
        def __len__(self) -> int:
            return 9

    loader = Short(TensorDataset(*samples(8)), batch_size=8)
    with pytest.raises(DataError, match="__len__"):
        fit(begin(Nothing(), net()), Data(loader), SGD)


def test_an_edit_keeps_the_fast_layout() -> None:
    run = begin(Midway(), net())
    run.apply(Factor("second", "spatial", (4,)))
    kernel = run.model.get_parameter("second.first.weight")
    assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_a_run_started_for_other_steps_is_refused() -> None:
    run = start(net(), Shrink(), example=(torch.zeros(1, 3, 6, 6),), steps=5)
    with pytest.raises(MethodError, match="steps=12"):
        fit(run, Data(samples()), SGD)


@dataclass(frozen=True)
class Poison(Method):
    """Breaks a layer at a step, and leaves a hook."""

    at: int

    def prepare(self, run: Run) -> None:
        run.hook(run.model.register_forward_hook(lambda *_: None))

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        if run.step == self.at:
            run.model.get_parameter("second.weight")[0, 0, 0, 0] = math.nan


def test_a_loss_that_is_not_finite_stops_and_names_the_layer(tmp_path: Any) -> None:
    run = begin(Poison(6), net())
    train = Train(epochs=EPOCHS, batch=BATCH, lr=0.05, device="cpu", checkpoint_every=1)
    with pytest.raises(TrainingError, match=r"step 6.*second") as caught:
        fit(run, Data(samples()), train, folder=tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert not run.model._forward_hooks
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["run"]["step"] == 5
    assert all(torch.isfinite(v).all() for v in saved["model"].values())


def test_a_loss_that_explodes_names_the_layer() -> None:
    run = begin(Nothing(), net())
    train = Train(epochs=EPOCHS, batch=BATCH, lr=1e30, schedule="constant", device="cpu")
    with pytest.raises(TrainingError, match="learning rate"):
        fit(run, Data(samples()), train)


def test_a_forward_that_fails_names_the_shape() -> None:
    batches = [(samples()[0][:8], samples()[1][:8]), (torch.zeros(8, 5, 6, 6), samples()[1][:8])]
    run = begin(Poison(99), net())
    with pytest.raises(ModelError, match=r"\(8, 5, 6, 6\)"):
        fit(run, Data(batches), Train(epochs=6, batch=8, lr=0.1, device="cpu"))
    assert not run.model._forward_hooks
