"""Numbers as people read them."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

NONE = "–"
CLOSE = 1.25  # below it a tenth is too coarse


def human(value: float | None, unit: str = "") -> str:
    """Write a number with three digits that matter: 999, 67.1k, 1.23M, 4.5G.

    >>> human(269722), human(1_234_567), human(12.0), human(0.0123456)
    ('270k', '1.23M', '12', '0.0123')
    """
    if value is None or not math.isfinite(value):
        return NONE
    tail = f" {unit}" if unit else ""
    if abs(value) < 999.5:
        text = str(int(value)) if value == int(value) else f"{value:.3g}"
        return text + tail
    rounded = float(f"{value:.3g}")
    power = min(int(math.log10(abs(rounded)) // 3), 4)
    short = rounded / 1000**power
    places = max(0, 2 - int(math.log10(abs(short))))
    return f"{short:.{places}f}{' ' if unit else ''}{'kMGT'[power - 1]}{unit}"


def size(value: float | None) -> str:
    """Write a number of bytes: 1.08 MB."""
    return human(value, "B")


def milliseconds(value: float | None) -> str:
    """Write a latency."""
    return NONE if value is None else f"{value:.3g} ms"


def spread(value: float | None, around: float | None) -> str:
    """Write a latency with its spread: 3.41 ± 0.05 ms."""
    if value is None or not around:
        return milliseconds(value)
    return f"{value:.3g} ± {around:.1g} ms"


def seconds(value: float | None) -> str:
    """Write a duration: 0.42 s, 38 s, 2 min 05 s, 1 h 12 min."""
    if value is None or not math.isfinite(value):
        return NONE
    if value < 10:
        return f"{value:.2g} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def percent(share: float | None, digits: int = 1) -> str:
    """Write a share of one: 98.2 %."""
    if share is None or not math.isfinite(share):
        return NONE
    return f"{100 * share:.{digits}f} %"


def metric(rows: Iterable[Mapping[str, Any]]) -> str:
    """Name the metric by which networks were judged; "score" where there are several."""
    names = {str(row.get("metric", "accuracy")) for row in rows if known(scored(row))}
    return "accuracy" if not names else names.pop() if len(names) == 1 else "score"


def scored(row: Mapping[str, Any]) -> float | None:
    """Return what a network scores by the metric that judges it; rows of old have accuracy."""
    value = row["score"] if "score" in row else row.get("accuracy")
    return None if value is None else float(value)


def score(row: Mapping[str, Any]) -> str:
    """Write what a network scores: 98.20 %, or 31.2 dB."""
    value, unit = scored(row), row.get("unit", "share")
    if unit == "share":
        return percent(value, 2)
    return f"{value:.4g} {unit}".strip() if value is not None and known(value) else NONE


def named_score(row: Mapping[str, Any]) -> str:
    """Write what a network scores, and by which metric: mIoU 61.30 %."""
    text = score(row)
    return text if text == NONE else f"{row.get('metric', 'accuracy')} {text}"


def lost(row: Mapping[str, Any]) -> str:
    """Write how much was lost: points of a percent of a share, percent of anything else."""
    value = row.get("lost")
    if value is None:
        return NONE
    return f"{value:.2f}" if row.get("unit", "share") == "share" else f"{value:.2f} %"


def times(before: float | None, after: float | None) -> str:
    """Write how often the new number fits into the old one: 4.2×, and 1.04× where it is close."""
    if not before or not after:
        return NONE
    ratio = before / after
    digits = 2 if ratio < CLOSE else 1 if ratio < 99.95 else 0
    return f"{ratio:.{digits}f}×"


def known(value: float | None) -> bool:
    """Say whether a score is there: it is not a number where labels are not classes."""
    return value is not None and math.isfinite(value)


def points(before: float | None, after: float | None) -> str:
    """Write a change of accuracy in points of a percent: −0.2 points."""
    if before is None or after is None or not known(after - before):
        return NONE
    return f"{signed(100 * (after - before), 2)} points"


def signed(value: float, digits: int) -> str:
    """Write a change: +0.12, −3, and 0 without a sign."""
    text = f"{abs(value):.{digits}f}"
    return text if float(text) == 0 else ("−" if value < 0 else "+") + text


def plain(value: Any) -> str:
    """Write any plain value for people."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else NONE
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {plain(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(plain, value)) or NONE
    return str(value) or NONE


def facts(values: Mapping[str, Any], under: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested plain data as flat pairs of words: ("onnx: max difference", "1.2e-06")."""
    for key, value in values.items():
        name = under + str(key).replace("_", " ")
        if isinstance(value, Mapping):
            yield from facts(value, f"{name}: ")
        else:
            yield name, size(value) if name.endswith("bytes") else plain(value)
