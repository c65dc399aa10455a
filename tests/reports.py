"""A realistic report made by hand: ResNet-20 with spectra for ten epochs."""

import math
from dataclasses import replace
from typing import Any

from pliant.result import LayerRow, Report, Side

EPOCHS, FINETUNE, STEPS = 8, 2, 40


def _shapes() -> list[tuple[str, int, int, int]]:
    """(name, in, out, side of the output) of every convolution of ResNet-20."""
    rows, before = [("conv1", 3, 16, 32)], 16
    for stage, width in enumerate((16, 32, 64), 1):
        for block in range(3):
            for number in (1, 2):
                source = before if number == 1 else width
                rows.append((f"layer{stage}.{block}.conv{number}", source, width, 64 >> stage))
            before = width
    return rows


def _spectrum(count: int, epoch: float, depth: float, *, penalty: bool) -> list[float]:
    if not penalty:
        return [(2.2 + 0.35 * epoch) * math.exp(-1.6 * i / count) for i in range(count)]
    rank = count * (1 - 0.075 * epoch * (0.5 + depth))
    tail = [1 / (1 + math.exp(8 * (i - rank) / count)) for i in range(count)]
    return [2.4 * math.exp(-1.2 * i / count) * t for i, t in enumerate(tail)]


def _rank(values: list[float], p: float = 0.95) -> int:
    total, running = sum(v * v for v in values), 0.0
    for index, value in enumerate(values, 1):
        running += value * value
        if running >= p * total:
            return index
    return len(values)


def _epoch(epoch: int, *, control: bool) -> dict[str, Any]:
    shapes = _shapes()
    spectra = {
        name: {
            side: _spectrum(count, epoch, index / len(shapes), penalty=not control)
            for side, count in (("in", source), ("out", out))
        }
        for index, (name, source, out, _) in enumerate(shapes)
        if index
    }
    row: dict[str, Any] = {
        "step": epoch * STEPS, "epoch": epoch, "phase": "search", "spectra": spectra,
        "ranks": {n: [_rank(s["in"]), _rank(s["out"])] for n, s in spectra.items()},
        "val_loss": 0.9 * math.exp(-epoch / 5) + 0.35, "accuracy": 0.9 - 0.3 * math.exp(-epoch / 3),
    }  # fmt: skip
    return {**row, "control": True, "accuracy": row["accuracy"] + 0.01} if control else row


def _history(*, control: bool) -> tuple[dict[str, Any], ...]:
    rows: list[dict[str, Any]] = []
    for step in range(0, (EPOCHS + FINETUNE) * STEPS, 4):
        phase = "search" if step < EPOCHS * STEPS else "finetune"
        if step % STEPS == 0 and step <= EPOCHS * STEPS:
            rows.append(_epoch(step // STEPS, control=False))
        rows.append({
            "step": step, "epoch": step // STEPS, "phase": phase, "alpha": 1e-5 * step,
            "loss": 1.6 * math.exp(-step / 130) + 0.3 + 0.05 * math.sin(step),
            "lr": 0.01 * (1 + math.cos(math.pi * step / (10 * STEPS))),
        })  # fmt: skip
    for epoch in range(EPOCHS + 1) if control else ():
        rows.append(_epoch(epoch, control=True))
    return tuple(rows)


def _layer(index: int, name: str, source: int, out: int, side: int) -> LayerRow:
    params, area = 9 * source * out, side * side
    before = {"params": params, "macs": params * area, "bytes": 4 * params}
    if index == 0:
        why = "its 3 input channels leave nothing to save: a factorization would cost more"
        return LayerRow(name, "Conv2d", "dense", (), None, before, before, why)
    if out == 16:
        why = "at the ranks it needs, every form costs more than the 2,304 parameters it has"
        return LayerRow(name, "Conv2d", "dense", (), None, before, before, why)
    depth = index / 19
    ranks = tuple(max(4, round(count * (0.62 - 0.35 * depth))) for count in (source, out))
    form = "spatial" if index % 5 == 0 else "tucker2"
    now = source * ranks[0] + 9 * ranks[0] * ranks[1] + ranks[1] * out
    if form == "spatial":
        ranks = ranks[:1]
        now = 3 * ranks[0] * (source + out)
    after = {"params": now, "macs": now * area, "bytes": 4 * now}
    return LayerRow(name, "Conv2d", form, ranks, None, before, after)


def _norm(name: str, width: int) -> LayerRow:
    cost = {"params": 2 * width, "macs": 0, "bytes": 16 * width + 8}
    why = "no matrix to change: its parameters are vectors"
    return LayerRow(name, "BatchNorm2d", "dense", (), None, cost, cost, why)


def elastic(*, count: int = 8, timed: bool = True) -> Report:
    """Return the report of a network that was compressed to several sizes in one file."""
    report, rows = resnet20(), []
    for size in range(count):
        share, after = 1 - 0.75 * size / (count - 1), report.after
        rows.append(
            replace(
                after,
                params=round(share * after.params),
                macs=round(share * after.macs),
                accuracy=0.9183 - 0.06 * (1 - share) ** 2,
                latency_ms=2.12 - 0.9 * (1 - share) if timed else None,
            )
        )
    return replace(report, sizes=tuple(rows))


def resnet20(*, control: bool = True, **changes: Any) -> Report:
    """Return the report of a run; ``control`` adds the rows of a run without penalty."""
    layers: list[LayerRow] = []
    for index, shape in enumerate(_shapes()):
        layers += [_layer(index, *shape), _norm(shape[0].replace("conv", "bn"), shape[2])]
    head = {"params": 650, "macs": 640, "bytes": 2600}
    layers.append(LayerRow("fc", "Linear", "dense", (), None, head, head, "excluded by fc*"))
    sums = [
        {axis: sum(getattr(row, side)[axis] for row in layers) for axis in head}
        for side in ("before", "after")
    ]
    before = Side(**sums[0], latency_ms=3.41, accuracy=0.9216, loss=0.3312)
    after = Side(**sums[1], latency_ms=2.12, accuracy=0.9183, loss=0.3401)
    report = Report(
        model="resnet20",
        data="cifar10",
        method={
            "name": "nrmf",
            "options": {"alpha": 0.01, "p": 0.95, "form": "auto", "exclude": ["fc*"]},
        },
        budget={"params": 0.4},
        before=before,
        after=after,
        layers=tuple(layers),
        met=True,
        misses=(),
        history=_history(control=control),
        seconds={
            "measure": 1.2,
            "search": 183.4,
            "factorize": 0.8,
            "finetune": 47.9,
            "export": 6.3,
        },
        seed=0,
        device="cpu",
        versions={
            "python": "3.11.9",
            "machine": "A processor of 2020, 2 threads",
            "pliant": "0.1.0",
            "torch": "2.13.0",
        },
        export={
            "onnx": {"path": "model.onnx", "bytes": 462_000, "opset": 18, "max_difference": 2.4e-6}
        },
        train={
            "epochs": EPOCHS,
            "finetune": FINETUNE,
            "batch": 128,
            "lr": 0.02,
            "optimizer": "sgd",
            "schedule": "cosine",
            "clip": None,
        },
    )
    return replace(report, **changes)
