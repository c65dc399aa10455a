"""`pliant auto`: the best network that any of a short list of methods makes."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from pliant import api
from pliant.api.shortlist import GOALS
from pliant.budget import Budget
from pliant.cli import compress, console, folder, images, measure, source
from pliant.cli.progress import Bars
from pliant.data import Train, load
from pliant.errors import AccuracyWarning


@console.refusals
def auto(
    model: Annotated[str, typer.Argument(help=compress.HELP, show_default=False)],
    data: Annotated[str, typer.Option(help="mnist5k, digits, a folder, or module:callable")],
    size: images.Size = None,
    normalize: images.Normalize = "auto",
    augment: images.Augment = "auto",
    budget: Annotated[
        str | None, typer.Option(help="limits, such as latency=5 or bytes=500kB")
    ] = None,
    lose: Annotated[float | None, typer.Option(help="points that may be lost (default: 2)")] = None,
    goal: Annotated[
        str | None, typer.Option(help=f"what is made small without limits: {', '.join(GOALS)}")
    ] = None,
    target: Annotated[str | None, typer.Option(help="where to measure milliseconds")] = None,
    threads: Annotated[int | None, typer.Option(help="of the target")] = None,
    epochs: Annotated[float, typer.Option(help="passes for each finalist; 0 trains none")] = 0.0,
    finetune: Annotated[float, typer.Option(help="passes afterwards")] = 0.0,
    lr: Annotated[float | None, typer.Option(help="highest learning rate")] = None,
    batch: Annotated[int | None, typer.Option(help="samples per batch")] = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd or adamw")] = None,
    weights: Annotated[str | None, typer.Option(help="safetensors file, or a known name")] = None,
    architecture: source.Architecture = None,
    out: Annotated[
        Path | None, typer.Option(help="folder of the run (default: runs/MODEL-auto)")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", "--overwrite", help="replace the run in the folder")
    ] = False,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="write ONNX too")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Try low rank, channels, int8 and their chains on MODEL, and keep what measures best."""
    bounds = Budget.parse(budget) if budget else Budget()
    bounds = replace(bounds, drop=lose) if lose is not None else bounds
    place = out or Path(f"runs/{Path(model.partition(':')[2] or model).stem}-auto")
    timed = measure.target_of(target, threads, None, asked=bool(bounds.latency))
    given: dict[str, Any] = {"lr": lr, "batch": batch, "optimizer": optimizer}
    train = Train(epochs=epochs, finetune=finetune)
    train = replace(train, **{key: value for key, value in given.items() if value is not None})
    samples = load(data, seed=seed, **images.prepared(size, normalize, augment))
    classes = samples.class_count or None
    found = source.find(
        model, weights=weights, architecture=architecture, classes=classes, seed=seed
    )
    with (
        folder.claimed(place, force=force, resume=False),
        Bars(quiet=as_json) as bars,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", AccuracyWarning)
        result = api.auto(
            found.model, samples, bounds, goal=goal, target=timed, seed=seed, name=found.name,
            train=train if epochs or finetune else None, watch=bars.watch,
        )  # fmt: skip
        bars.watch({"phase": "write"})
        result = replace(result, edits=(*found.edits, *result.edits))
        extra = compress.extra(samples, found)
        written = folder.fill(
            place, result, samples.example(), source=found.made_by, extra=extra, onnx=onnx
        )
    compress.end(written, as_json=as_json)
