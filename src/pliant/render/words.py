"""The sentences that every renderer shares, so that all of them say the same."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pliant import registry
from pliant.budget import share_of
from pliant.errors import MethodError
from pliant.registry import Entry
from pliant.render.quantities import (
    NONE as NONE,
)
from pliant.render.quantities import (
    facts as facts,
)
from pliant.render.quantities import (
    human as human,
)
from pliant.render.quantities import (
    known as known,
)
from pliant.render.quantities import (
    milliseconds as milliseconds,
)
from pliant.render.quantities import (
    percent as percent,
)
from pliant.render.quantities import (
    plain as plain,
)
from pliant.render.quantities import (
    points as points,
)
from pliant.render.quantities import (
    score as score,
)
from pliant.render.quantities import (
    seconds as seconds,
)
from pliant.render.quantities import (
    signed as signed,
)
from pliant.render.quantities import (
    size as size,
)
from pliant.render.quantities import (
    spread as spread,
)
from pliant.render.quantities import (
    times as times,
)
from pliant.result import LayerRow, Report, Side

LEFT = "left alone"
UNCHANGED = 0.005  # a ratio nearer to 1 than this is called unchanged
SPARE = 0.15  # share of the time allowed: to leave more is worth a word


@dataclass(frozen=True)
class Comparison:
    """One number of the network before and after, as text."""

    label: str
    before: str
    after: str
    change: str
    said: str = ""  # the change in words


COSTS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("params", "Parameters", human),
    ("macs", "MACs", human),
    ("bytes", "Bytes on disk", size),
    ("latency_ms", "Latency", milliseconds),
)


def comparisons(report: Report) -> list[Comparison]:
    """Return what was measured on both sides: scores first, then costs."""
    rows = []
    before, after = report.before, report.after
    for name in list(before.metrics) or ["accuracy"]:
        if name != "loss":
            rows += _scored(report, name)
    if known(before.loss) or known(after.loss):
        both = [f"{side.loss:.4g}" if known(side.loss) else NONE for side in (before, after)]
        rows.append(Comparison("Loss", both[0], both[1], _difference(before.loss, after.loss)))
    for axis, label, write in COSTS:
        old, new = getattr(before, axis), getattr(after, axis)
        if old is None and new is None:
            continue
        texts = [write(old), write(new)]
        if axis == "latency_ms":
            texts = [spread(side.latency_ms, side.latency_spread_ms) for side in (before, after)]
        rows.append(Comparison(label, texts[0], texts[1], times(old, new), _said(old, new)))
    return rows


def _value(side: Side, name: str) -> float | None:
    return side.metrics.get(name, side.accuracy if name == "accuracy" else None)


def _scored(report: Report, name: str) -> list[Comparison]:
    """Compare a metric: shares in points of a percent, others as the numbers that they are."""
    old, new = (_value(side, name) for side in (report.before, report.after))
    if not known(old) and not known(new):
        return []
    unit = _unit(report, name)
    label = "Accuracy" if name == "accuracy" else name
    written = [scored(report, side, name) for side in (report.before, report.after)]
    change = points(old, new) if unit == "share" else f"{_difference(old, new)} {unit}".strip()
    return [Comparison(label, written[0], written[1], change, change)]


def _unit(report: Report, name: str) -> str:
    return "share" if name == "accuracy" else report.metrics.get(name, {}).get("unit", "")


def scored(report: Report, side: Side, name: str) -> str:
    """Write what a network of a report scores by a metric."""
    return score({"score": _value(side, name), "unit": _unit(report, name)})


def _said(before: float | None, after: float | None) -> str:
    return NONE if not before or not after else _sized(before, after, "less", "more")


def _difference(before: float | None, after: float | None) -> str:
    if before is None or after is None or not known(after - before):
        return NONE
    return signed(after - before, 4)


def headline(report: Report) -> str:
    """Say what happened: "lenet5 on mnist5k: 4.2× smaller, 98.2 % → 98.0 %"."""
    where = f"{report.model} on {report.data}" if report.data else report.model
    said = [_sized(report.before.bytes, report.after.bytes, "smaller", "larger")]
    if report.before.latency_ms and report.after.latency_ms:
        said.append(_sized(report.before.latency_ms, report.after.latency_ms, "faster", "slower"))
    first = next(iter(report.before.metrics), "accuracy")
    scored = _scored(report, first)
    if known(report.before.accuracy) and known(report.after.accuracy) and first == "accuracy":
        said.append(f"{percent(report.before.accuracy)} → {percent(report.after.accuracy)}")
    elif scored:
        said.append(f"{scored[0].label} {scored[0].before} → {scored[0].after}")
    elif report.fidelity is not None and report.fidelity.agreement is not None:
        said.append(f"{percent(report.fidelity.agreement)} of answers as before")
    return f"{where}: {', '.join(said)}"


def _sized(before: float, after: float, less: str, more: str) -> str:
    if not before or not after or abs(before / after - 1) < UNCHANGED:
        return "unchanged" if less == "less" else f"no {less}"
    return f"{times(before, after)} {less}" if after < before else f"{times(after, before)} {more}"


def lost(report: Report) -> str:
    """Say how much of the score was lost, with its interval, and whether that may be.

    Empty where nothing was scored.
    """
    found = report.verdict
    if found is None or found.lost is None:
        return ""
    name = "Accuracy" if found.metric == "accuracy" else found.metric
    unit = "points" if found.unit == "points" else "%"
    change = "gained" if found.lost < 0 else "lost"
    said = f"{abs(found.lost):.1f} {unit} {change}"
    if found.low is not None and found.high is not None:
        ends = f"{signed(-found.high, 1)} to {signed(-found.low, 1)}"
        said += f" ({ends} on all such samples, 95 %)"
    if found.holds:
        return f"{name} kept: {said}, {found.bound:g} may be lost."
    return f"{name} lost: {said}, where {found.bound:g} may be."


def near(report: Report) -> str:
    """Say how near outputs are to the dense network's; empty where they were not compared."""
    found = report.fidelity
    if found is None:
        return ""
    same = (
        [] if found.agreement is None else [f"{percent(found.agreement)} of answers are the same"]
    )
    said = [*same, f"relative error {found.error:.2g}", f"cosine {found.cosine:.4f}"]
    of = "the example" if found.where == "example" else f"{found.samples} samples of {found.where}"
    return f"Beside the dense network, on {of}: {', '.join(said)}."


def fine(report: Report) -> bool:
    """Say whether a report is good news: the budget met, and no more lost than may be."""
    return report.met and (report.verdict is None or report.verdict.holds is not False)


def verdict(report: Report) -> str:
    """Say what was lost, whether the budget was met, and what was found in the training."""
    note = report.verdict.note if report.verdict else ""
    return " ".join(filter(None, (lost(report), _budget(report), note, *report.findings)))


def _budget(report: Report) -> str:
    if not report.budget:
        return "No budget was set."
    asked = ", ".join(f"{axis} ≤ {bound(report, axis)}" for axis in report.budget)
    if report.met:
        return f"Budget met: {asked}{_spare(report)}."
    return f"Budget missed ({asked}): {'; '.join(report.misses) or 'see the costs'}."


def _spare(report: Report) -> str:
    """Say that much of the time allowed is left, as after a plan made while the machine was slow.

    Where something else than time is bounded too, that may be the reason, and where the dense
    network takes no longer than allowed, nothing had to be planned.
    """
    took, dense = report.after.latency_ms, report.before.latency_ms
    limit = allowed(report, "latency") if [*report.budget] == ["latency"] else None
    if not (took and dense and limit) or limit >= dense or took > (1 - SPARE) * limit:
        return ""
    return (
        f", of which {100 * (1 - took / limit):.0f} % is left; longer comparisons "
        "(seconds of the target) may leave more of the network"
    )


def bound(report: Report, axis: str) -> str:
    """Write one bound of the budget: a fraction with what it comes to, or a number."""
    value = report.budget[axis]
    name = "latency_ms" if axis == "latency" else axis
    write = next((write for key, _, write in COSTS if key == name), human)
    limit = allowed(report, axis)
    if isinstance(value, int) or limit is None or limit == value:
        return write(value)
    share = share_of(value) if isinstance(value, str) else value
    return f"{100 * share:.3g} % of dense ({write(limit)})"


def allowed(report: Report, axis: str) -> float | None:
    """Return a bound of the budget in absolute numbers, None where it cannot be known."""
    value = report.budget[axis]
    if axis == "latency":
        if not isinstance(value, str):
            return float(value)
        dense = report.before.latency_ms
        return None if dense is None else share_of(value) * dense
    if isinstance(value, int) or value > 1:
        return value
    dense = getattr(report.before, axis, None)
    return None if dense is None else value * dense


def summary(report: Report) -> str:
    """Say in one sentence what was done to how many layers."""
    rows = [row for row in report.layers if row.before.get("macs", 0)] or list(report.layers)
    changed = sum(map(is_changed, rows))
    names = " and ".join(str(part["name"]) for part, _ in parts(report.method)) or "The method"
    rest = "" if changed == len(rows) else "; the table says why the others were left alone"
    return (
        f"{names} changed {changed} of the {len(rows)} layers that cost MACs{rest}.{_timed(report)}"
        f" {near(report)}"
    ).rstrip()


def _timed(report: Report) -> str:
    """Say what the comparison of both networks on the target found, with its interval."""
    if not report.target:
        return ""
    low, middle, high = (f"{value:.2f}" for value in report.target["times_faster"])
    return (
        f" On {report.target['name']} it is measured {report.target['verdict']}: "
        f"{middle}× the speed ({low} to {high})."
    )


def has_times(rows: Sequence[LayerRow]) -> bool:
    """Say whether layers were measured in milliseconds."""
    return any("latency" in row.before for row in rows)


def layer_times(row: LayerRow) -> tuple[str, str]:
    """Write the milliseconds of a layer before and after."""
    both = [side.get("latency") for side in (row.before, row.after)]
    before, after = (NONE if value is None else f"{value:.2g}" for value in both)
    return before, after


def is_changed(row: LayerRow) -> bool:
    """Say whether anything was done to a layer."""
    return row.form != "dense" or row.kept is not None or row.before != row.after


def what(row: LayerRow) -> str:
    """Say what a layer became: "tucker2 18/21", "48 of 64 channels", "left alone"."""
    said = []
    if row.form != "dense":
        said.append(f"{row.form} {'/'.join(map(str, row.ranks))}".strip())
    if row.kept is not None:
        said.append(f"{row.kept[0]} of {row.kept[1]} channels")
    return ", ".join(said) or ("changed" if is_changed(row) else LEFT)


def why(row: LayerRow) -> str:
    """Say why a layer was left alone; of a changed one, what to be wary of, mostly nothing."""
    if is_changed(row):
        return row.reason
    return row.reason or "no reason was recorded"


def saved(row: LayerRow, axis: str = "params") -> str:
    """Write the share of a layer's cost that is gone."""
    before, after = row.before.get(axis, 0), row.after.get(axis, 0)
    if not before or before == after:
        return NONE
    return f"{'−' if after < before else '+'}{abs(100 * (1 - after / before)):.0f} %"


def parts(method: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield the methods of a possibly composed one, each with a note on its share and budget."""
    for stage in method.get("stages", ()):
        note = f"share {human(stage['share'])}" if stage.get("share", 1) != 1 else ""
        budget = plain(stage.get("budget") or {})
        for part, deeper in parts(stage["method"]):
            yield part, ", ".join(filter(None, (deeper, note, budget and f"budget {budget}")))
    for part in method.get("methods", ()):
        yield from parts(part)
    if "name" in method and "stages" not in method and "methods" not in method:
        yield method, ""


def entry(name: str) -> Entry | None:
    """Return the registered method of a name, None for one that is not known here."""
    try:
        return registry.get(name)
    except MethodError:
        return None
