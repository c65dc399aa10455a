"""`pliant measure`: how long networks take where they are to run."""

from dataclasses import asdict, replace
from typing import Annotated, Any

import typer

from pliant.cli import console, source
from pliant.latency import Comparison, Target, Timing, compare
from pliant.latency import measure as time_of

MODEL = "a .pliant file, a zoo name, or module:callable"


@console.refusals
def measure(
    a: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    b: Annotated[str | None, typer.Argument(metavar="OTHER", help="to compare with it")] = None,
    target: Annotated[
        str, typer.Option(help="onnxruntime, torch or compile, with settings: torch,dtype=bfloat16")
    ] = "onnxruntime",
    threads: Annotated[int | None, typer.Option(help="of one inference (default: all)")] = None,
    batch: Annotated[int | None, typer.Option(help="samples of one inference")] = None,
    architecture: source.Architecture = None,
    shape: source.Shape = None,
    as_json: console.AsJson = False,
) -> None:
    """Measure MODEL on a target; with OTHER in turn with it, and say which one is faster.

    Both are run one after the other again and again, so that whatever else the machine does falls
    on both alike. The verdict counts the spread: where it is too wide, it says so.
    """
    place = target_of(target, threads, batch, asked=True)
    assert place is not None
    first = source.find(a, architecture=architecture)
    example = source.example(first, shape)
    if b is None:
        _show_one(first.name, time_of(first.model, example, place), place, as_json=as_json)
        return
    second = source.find(b, architecture=architecture)
    found = compare(first.model, second.model, example, place)
    _show_both((first.name, second.name), found, place, as_json=as_json)


def target_of(
    text: str | None, threads: int | None, batch: int | None, *, asked: bool
) -> Target | None:
    """Read a target and what other options say of it; None where nothing asks for one."""
    if text is None and threads is None and not asked:
        return None
    target = Target.parse(text or "onnxruntime")
    return replace(
        target,
        threads=target.threads if threads is None else threads,
        batch=target.batch if batch is None else batch,
    )


def _show_one(name: str, found: Timing, place: Target, *, as_json: bool) -> None:
    if as_json:
        console.print_json({"target": place.plain(), "model": {"name": name, **asdict(found)}})
        return
    console.out().print(f"{name}: {found} on {place}", markup=False)


def _show_both(names: tuple[str, str], found: Comparison, place: Target, *, as_json: bool) -> None:
    if as_json:
        rows: dict[str, Any] = {"target": place.plain()}
        for key, name, side in zip("ab", names, (found.a, found.b), strict=True):
            rows[key] = {"name": name, **asdict(side)}
        faster = {"speedup": found.speedup, "low": found.low, "high": found.high}
        console.print_json(rows | faster | {"verdict": found.verdict})
        return
    shown = console.out()
    for name, side in zip(names, (found.a, found.b), strict=True):
        shown.print(f"{name}: {side}", markup=False)
    shown.print(
        f"{names[1]} is {found.verdict}: {found.speedup:.2f} times the speed "
        f"({found.low:.2f} to {found.high:.2f}) on {place}.",
        markup=False,
        soft_wrap=True,
    )
