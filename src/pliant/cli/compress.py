"""`pliant compress`: from a network and data to a folder with a smaller one and a report."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.text import Text

from pliant import api
from pliant.api.verdict import said
from pliant.budget import Budget
from pliant.cli import console, folder, images, measure, source
from pliant.cli.progress import Bars
from pliant.compose import resolve
from pliant.data import Data, Train, load
from pliant.data.ready import task_of
from pliant.drivers import logs
from pliant.errors import AccuracyWarning, BudgetError, DataError, TrainingError
from pliant.method import Method
from pliant.registry import entry_of


@dataclass(frozen=True)
class Demo:
    """What runs without arguments: the NRMF paper's own example, in a minute or two."""

    model: str = "lenet5-wide"
    data: str = "mnist5k"
    method: str = "nrmf(alpha=0.001, search=1.0, p=0.98)"  # all epochs search; fine-tuning follows
    out: str = "runs/demo"
    train: Train = Train(
        epochs=6,
        finetune=4,
        batch=64,
        lr=0.002,
        optimizer="adamw",
        weight_decay=0.01,
        warmup=0.1,
    )


DEMO = Demo()
HELP = "a zoo name, module:callable, or a .pliant file; without it the demo runs"


@console.refusals
def compress(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help=HELP, show_default=False)] = None,
    data: Annotated[
        str | None,
        typer.Option(help="mnist5k, digits, a folder of parquet files or images, module:callable"),
    ] = None,
    size: images.Size = None,
    normalize: images.Normalize = "auto",
    augment: images.Augment = "auto",
    method: Annotated[
        str, typer.Option(help='a name, or one with options: "nrmf(alpha=0.01)"')
    ] = "nrmf",
    budget: Annotated[
        str | None,
        typer.Option(help="what the result may cost: params=0.3, macs=12M, latency=5, latency=50%"),
    ] = None,
    lose: Annotated[
        float | None,
        typer.Option(
            help="points of accuracy or another share that may be lost, percent of other metrics "
            "(default: 2)"
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="classification, binary, multi-label, regression, segmentation, next-token, "
            "super-resolution, own or none, with options: segmentation(void=255) (default: told "
            "from outputs and labels)"
        ),
    ] = None,
    allow_drop: Annotated[
        bool, typer.Option("--allow-drop", help="end well even if more was lost")
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(help="where to measure milliseconds: onnxruntime, torch, compile,batch=16"),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="of the target")] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="passes with the method; 0 calibrates only (default: 10)"),
    ] = None,
    finetune: Annotated[float | None, typer.Option(help="passes afterwards (default: 0)")] = None,
    lr: Annotated[float | None, typer.Option(help="highest learning rate")] = None,
    batch: Annotated[int | None, typer.Option(help="samples per batch")] = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd or adamw")] = None,
    warmup: Annotated[float | None, typer.Option(help="share of the steps")] = None,
    distill: Annotated[
        float | None, typer.Option(help="weight of learning from the dense network, 0 to 1")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="safetensors file with the network's weights, or mnist5k for lenet5"),
    ] = None,
    architecture: source.Architecture = None,
    control: Annotated[
        bool | None,
        typer.Option(
            "--control/--no-control",
            help="also train the dense network, to compare with (default: if it has no weights)",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder of the run (default: runs/MODEL-METHOD)")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on where a run stopped")] = False,
    force: Annotated[
        bool, typer.Option("--force", "--overwrite", help="replace the run in the folder")
    ] = False,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps")] = None,
    precision: Annotated[str | None, typer.Option(help="32-true, bf16-mixed, ...")] = None,
    encode: Annotated[
        Literal["hac", "ans", "auto"] | None,
        typer.Option(help="store tensors coded, without loss, where that is smaller"),
    ] = None,
    log_to: Annotated[
        str | None,
        typer.Option(help="log too: csv:FOLDER, tensorboard:FOLDER, mlflow, wandb:PROJECT"),
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="write ONNX too")] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="print the result as JSON, and nothing else")
    ] = False,
) -> None:
    """Compress MODEL: train it with a method, or only calibrate, measure it and write it.

    Without arguments it compresses the paper's own example into runs/demo.
    """
    demo = model is None
    if not demo and data is None:
        raise DataError(
            f"Name the data to compress {model} on: --data mnist5k, digits, a folder of parquet "
            "files, an image folder, or module:callable."
        )
    given: dict[str, Any] = {
        "epochs": epochs, "finetune": finetune, "lr": lr, "batch": batch, "optimizer": optimizer,
        "warmup": warmup, "distill": distill, "device": device, "precision": precision,
    }  # fmt: skip
    train = replace(
        DEMO.train if demo else Train(), **{k: v for k, v in given.items() if v is not None}
    )
    if control and not (train.epochs or train.finetune):
        raise TrainingError(
            "--control trains the dense network for as many epochs as the smaller one, but there "
            "are none: add --epochs, or leave --control out."
        )
    default = console.is_default(context, "method")
    built = resolve(DEMO.method if demo and default else method)
    bounds = Budget.parse(budget) if budget else None
    if lose is not None:
        bounds = replace(bounds or Budget(), drop=lose)
    place_of_time = measure.target_of(target, threads, None, asked=bool(bounds and bounds.latency))
    place = out or Path(DEMO.out if demo else f"runs/{_stem(str(model))}-{_name(built)}")
    task_of(task)  # refused before anything is loaded
    logs.check(log_to)
    samples = load(data or DEMO.data, seed=seed, **images.prepared(size, normalize, augment))
    found = source.find(
        model or DEMO.model,
        weights=weights,
        architecture=architecture,
        classes=samples.class_count or None,
        seed=seed,
    )
    with (
        folder.claimed(place, force=force, resume=resume, own=demo and out is None),
        Bars(quiet=as_json) as bars,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", AccuracyWarning)  # said at the end, and by the exit code
        try:
            result = api.compress(
                found.model,
                samples,
                built,
                bounds,
                train=train if train.epochs or train.finetune else None,
                target=place_of_time,
                seed=seed,
                strict=False,
                name=found.name,
                control=not found.trained if control is None else control,
                folder=place,
                resume=resume,
                watch=bars.watch,
                task=task,
            )
            bars.watch({"phase": "onnx" if onnx else "write"})
            result = replace(result, edits=(*found.edits, *result.edits))
            written = folder.fill(
                place,
                result,
                samples.example(),
                source=found.made_by,
                extra=extra(samples, found),
                onnx=onnx,
                encode=encode,
            )
        except KeyboardInterrupt:
            bars.progress.stop()
            raise _stopped(context, place) from None
    try:
        end(written, as_json=as_json, allow_drop=allow_drop)
    finally:  # the result stands, and is said, whatever becomes of the log
        if log_to:
            log = logs.logger(log_to, place.name)
            logs.write(log, written.report.history, asdict(written.report.after))


def end(written: folder.Written, *, as_json: bool, allow_drop: bool = False) -> None:
    """Print what came out, and end in red where it is not what was asked for.

    Raises:
        BudgetError: the budget was missed.
        typer.Exit: more was lost than may be.
    """
    _print(written, as_json=as_json)
    if not written.report.met:
        raise BudgetError(f"The result misses the budget: {'; '.join(written.report.misses)}.")
    verdict = written.report.verdict
    if verdict is not None and verdict.holds is False and not allow_drop:
        console.err().print(Text(said(verdict), "red"), soft_wrap=True)
        raise typer.Exit(console.DROPPED)


def _stem(model: str) -> str:
    """Make a folder's name of MODEL."""
    return Path(model.partition(":")[2] or model).stem


def _name(method: Method) -> str:
    entry = entry_of(method)
    return entry.name if entry else type(method).__name__.lower()


def extra(samples: Data, found: source.Source) -> dict[str, Any]:
    """What a file should know beside the weights: how inputs look, and what outputs mean."""
    example = samples.example()
    first = None if isinstance(example, Mapping) else next(iter(example), None)
    extra: dict[str, Any] = {"classes": found.classes or samples.class_count}
    if first is not None:
        extra["input"] = list(first.shape[1:])
    if samples.mean:
        extra |= {"mean": list(samples.mean), "std": list(samples.std)}
    if not isinstance(samples.classes, int):
        extra["class_names"] = list(samples.classes)
    return extra


def _stopped(context: typer.Context, place: Path) -> typer.Exit:
    """Say where the state is and how to go on."""
    kept = (place / folder.CHECKPOINT).exists() or (place / folder.CONTROL).exists()
    said = f"the state is saved in {place}" if kept else "nothing had to be saved yet"
    command = console.again(context, add="--resume", drop=("force", "resume"))
    console.err().print(f"Stopped; {said}. Go on with:\n  {command}", soft_wrap=True, markup=False)
    return typer.Exit(console.INTERRUPTED)


def _print(written: folder.Written, *, as_json: bool) -> None:
    report = written.report
    if as_json:
        plain = json.loads(report.to_json())
        del plain["history"]
        console.print_json(plain | {"files": [str(path) for path in written.files]})
        return
    console.print_report(report, written.files)
    if written.note:
        console.err().print(written.note, soft_wrap=True, markup=False, style="yellow")
