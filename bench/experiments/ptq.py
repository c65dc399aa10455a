"""Rounding to few bits after training, beside torchao and onnxruntime: accuracy by bits and images.

Every rival looks at the same training images, augmented alike, and at no label.
"""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import tasks
from bench.claim import judged
from bench.compress import scored
from bench.experiments import Cell, Cells, Table, by_seed, paired, pick, values
from bench.stats import mean, plus_minus, spread
from pliant.cost import cost
from pliant.data import Data, unpack
from pliant.edits import replay
from pliant.errors import require
from pliant.families.quantize.tuning import block_errors
from pliant.files.onnx import to_onnx
from pliant.math.quantize import levels
from pliant.registry import build, plain
from pliant.run import start
from pliant.surgery.blocks import blocks
from pliant.surgery.fold import foldable
from pliant.surgery.select import readable

Settings = Mapping[str, Any]
LIBRARIES = ("onnx", "onnxruntime", "torchao", "brevitas")
BATCH = 32  # images of a calibration batch
ROWS = 250  # images of a batch in onnxruntime
DENSE = "float32"


def cells(settings: Settings) -> list[Cell]:
    """List every rival with every number of images and every seed; the dense networks first."""
    rows = []
    for task in settings["tasks"]:
        shared = tasks.plan({**settings, "task": task})
        rows.append(Cell({"task": task, "rival": DENSE}, {**shared, "kind": DENSE}))
        for row in settings["rivals"]:
            if task not in row["tasks"]:
                continue
            spec = row.get("spec", "").format(**settings["steps"])
            plan = {**shared, "kind": row["kind"], "method": plain(build(spec)) if spec else {}}
            plan |= {"activations": row["activations"]} if "activations" in row else {}
            rows += [
                Cell(
                    {"task": task, "rival": row["rival"], "samples": images, "seed": seed},
                    {**plan, "samples": images, "bits": row.get("bits", 0), "spec": spec},
                )
                for images in row["samples"]
                for seed in row.get("seeds", [0])
            ]
    return rows


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Round one network and score it."""
    model, data = tasks.base(cell.plan, watch).eval(), tasks.data_of(cell.plan)
    kinds: dict[str, Callable[..., dict[str, Any]]] = {
        "pliant": _pliant,
        "exported": _exported,
        "held out": _held_out,
        "onnxruntime": _onnxruntime,
        "brevitas": _brevitas,
        "torchao kernels": _torchao_kernels,
        "torchao": _torchao,
    }
    if cell.plan["kind"] == DENSE:
        return scored(model, data)
    found = kinds[cell.plan["kind"]](model, data, cell.plan, cell.key["seed"])
    if "answers" not in found:
        return found
    answers, dense = found.pop("answers"), _dense_answers(cell)
    return {**_compared(answers, dense, data), **found}


_KNOWN: dict[str, Tensor] = {}


def _dense_answers(cell: Cell) -> Tensor:
    """What the float32 network says; computed once in a process."""
    key = str(tasks.base_path(cell.plan))
    if key not in _KNOWN:
        _KNOWN[key] = _answers(tasks.base(cell.plan).eval(), tasks.data_of(cell.plan))
    return _KNOWN[key]


def _compared(answers: Tensor, dense: Tensor, data: Data) -> dict[str, Any]:
    """Accuracy, and the share of images on which the network says what float32 says."""
    labels = torch.cat([unpack(item)[1] for item in data.batches("test", ROWS)])
    right, agreed = (float((answers == other).float().mean()) for other in (labels, dense))
    return {"accuracy": right, "agreement": agreed}


@torch.no_grad()
def _answers(model: nn.Module, data: Data) -> Tensor:
    found = [model(*unpack(item)[0]).argmax(1) for item in data.batches("test", ROWS)]
    return torch.cat(found)


# ---------------------------------------------------------------- pliant


def _run(model: nn.Module, data: Data, plan: Mapping[str, Any], seed: int, **changes: Any) -> Any:
    method = replace(build(plan["spec"]), **{"samples": plan["samples"], **changes})
    run = start(model, method, data=data, seed=seed)
    run.finish()
    return run


def _pliant(model: nn.Module, data: Data, plan: Mapping[str, Any], seed: int) -> dict[str, Any]:
    began = time.monotonic()
    run = _run(model, data, plan, seed)
    seconds = round(time.monotonic() - began, 2)
    size = cost(run.model, data.example()).bytes
    return {"answers": _answers(run.model.eval(), data), "bytes": size, "seconds": seconds}


def _exported(model: nn.Module, data: Data, plan: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The same network, written as ONNX and scored in onnxruntime, which computes in integers."""
    run = _run(model, data, plan, seed)
    with tempfile.TemporaryDirectory() as folder:
        done = to_onnx(run.model, Path(folder) / "network.onnx", data.example(2))
        return {"answers": _answers_of(done.path, data), "file": done.bytes}


def _held_out(model: nn.Module, data: Data, plan: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """By how much stage 1 lowers each block's error on images that it has not seen."""
    teacher = copy.deepcopy(model)
    replay(teacher, foldable(teacher, data.example()))
    names = blocks(teacher, readable(teacher)[0], data.example())
    batches = [unpack(item)[0] for item in data.subset(test=plan["samples"]).batches("test", 64)]
    errors = [
        block_errors(
            teacher, _run(copy.deepcopy(model), data, plan, seed, **off).model, names, batches
        )
        for off in ({"independent": 0}, {})
    ]
    ratios = {name: errors[1][name] / errors[0][name] for name in names}
    return {
        "largest": max(ratios.values()),
        "median": statistics.median(ratios.values()),
        "blocks": {name: round(ratio, 4) for name, ratio in ratios.items()},
    }


# ---------------------------------------------------------------- the others


def _onnxruntime(
    model: nn.Module, data: Data, plan: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = to_onnx(model, folder / "float.onnx", data.example(2)).path
        began = time.monotonic()
        path = quantized_by_onnxruntime(
            source, folder, data, plan["samples"], seed, bits=plan["bits"] or 8
        )
        seconds = round(time.monotonic() - began, 2)
        size = path.stat().st_size
        return {"answers": _answers_of(path, data), "file": size, "seconds": seconds}


def quantized_by_onnxruntime(
    source: Path, folder: Path, data: Data, count: int, seed: int, *, bits: int = 8
) -> Path:
    """Quantize a network by onnxruntime's own tool: per channel, ranges by the extremes.

    Activations have 8 bits, weights 8 or 4.

    It looks at the images that Pliant's method looks at first, in the same crops.
    """
    tools = require("onnxruntime.quantization", "onnx")
    name = session(source).get_inputs()[0].name
    feed = ({name: images.numpy()} for images in _looked_at(data, count, seed))

    class Images(tools.CalibrationDataReader):  # type: ignore[misc,name-defined]
        def get_next(self) -> Any:
            return next(feed, None)

    target = folder / "int8.onnx"
    tools.quantize_static(
        source,
        target,
        Images(),
        quant_format=tools.QuantFormat.QDQ,
        per_channel=True,
        activation_type=tools.QuantType.QUInt8,
        weight_type=tools.QuantType.QInt4 if bits == 4 else tools.QuantType.QInt8,
    )
    return target


def _looked_at(data: Data, count: int, seed: int) -> Iterator[Tensor]:
    few = data.subset(train=count, seed=seed)
    passed = few.batches("train", BATCH, seed=seed, augment=True, shuffle=True)
    return (unpack(item)[0][0] for item in passed)


def _brevitas(model: nn.Module, data: Data, plan: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Its recipe of static quantization: kernels by channel and least error, biases corrected.

    The first layer has 8 bits of both. Other activations are rounded by percentile.
    """
    tools = require("brevitas_examples.imagenet_classification.ptq.ptq_common", "bench")
    replay(model, foldable(model, data.example()))
    batches = [(images, None) for images in _looked_at(data, plan["samples"], seed)]
    began = time.monotonic()
    found = tools.quantize_model(
        model,
        "layerwise",
        weight_bit_width=plan["bits"],
        act_bit_width=plan["activations"],
        bias_bit_width=None,
        weight_quant_granularity="per_channel",
        weight_param_method="mse",
        act_quant_percentile=99.999,
        act_quant_type="asym",
        scale_factor_type="float_scale",
        quant_format="int",
    )
    tools.calibrate(batches, found)
    tools.apply_bias_correction(batches, found)
    seconds = round(time.monotonic() - began, 2)
    return {"answers": _answers(found.eval(), data), "seconds": seconds}


def _torchao_kernels(
    model: nn.Module, data: Data, plan: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """Its affine primitives on every kernel: symmetric, one scale for each output channel."""
    tools = require("torchao.quantization.quant_primitives", "bench")
    low, high = levels(plan["bits"])
    replay(model, foldable(model, data.example()))
    for layer in readable(model)[0].values():
        weight = layer.weight.detach()
        block = (1, *weight.shape[1:])
        scale, zero = tools.choose_qparams_affine(
            weight, tools.MappingType.SYMMETRIC, block, torch.int8, low, high
        )
        found = tools.quantize_affine(weight, block, scale, zero, torch.int8, low, high)
        layer.weight.data = tools.dequantize_affine(
            found, block, scale, zero, torch.int8, low, high
        ).to(weight.dtype)
    return {"answers": _answers(model, data)}


def _torchao(model: nn.Module, data: Data, plan: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Its `quantize_` as users call it; it changes Linear layers only."""
    tools = require("torchao.quantization", "bench")
    tools.quantize_(model, tools.Int8WeightOnlyConfig())
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    changed = [m for m in layers if type(m.weight.data) is not Tensor]
    answers = _answers(model, data)
    return {"answers": answers, "changed": len(changed), "layers": len(layers)}


def session(path: Path, threads: int = 0) -> Any:
    """Open a network in onnxruntime; with as many threads as PyTorch if none are named."""
    runtime = require("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _answers_of(path: Path, data: Data) -> Tensor:
    running = session(path)
    name = running.get_inputs()[0].name
    batches = (unpack(item)[0][0].numpy() for item in data.batches("test", ROWS))
    found = [torch.as_tensor(running.run(None, {name: images})[0]).argmax(1) for images in batches]
    return torch.cat(found)


# ---------------------------------------------------------------- what came out


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say what the card demands, and how the others compare."""
    asked = settings["claims"]
    task, samples = asked["task"], asked["samples"]

    def of(rival: str, name: str) -> dict[Any, float]:
        images = {} if rival == DENSE else {"samples": samples}
        return by_seed(cells, name, task=task, rival=rival, **images)

    rows = [
        judged(
            f"{task}, {name}: {first} beats {second}",
            paired(of(first, name), of(second, name), 100),
            how,
            target,
            "points",
        )
        for first, second, how, target in asked["beats"]
        for name in ("accuracy", "agreement")
    ]
    rows += [
        judged(
            f"{task}: {rival} is within {most} of {DENSE}",
            *(paired(of(rival, "accuracy"), of(DENSE, "accuracy"), -100), "<=", most, "points"),
        )
        for rival, most in asked["within"].items()
    ]
    if "held_out" in asked:
        worst = values(cells, "largest", task=task)
        text = f"{task}: stage 1 lowers every block's error on unseen images, the largest ratio"
        rows.append(judged(text, worst, "<=", asked["held_out"], "x"))
    return rows


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give mean and standard deviation over the seeds, a row per network, rival and images."""
    keys = [tuple(c["key"].get(k) for k in ("task", "rival", "samples")) for c in cells]
    rows = []
    for task, rival, samples in dict.fromkeys(keys):
        row: dict[str, Any] = {"task": task, "rival": rival, "samples": samples}
        for name in ("accuracy", "agreement", "bytes", "file", "seconds", "largest", "median"):
            found = values(cells, name, task=task, rival=rival, samples=samples)
            if found:
                row[name] = {"mean": mean(found), "sd": spread(found), "seeds": len(found)}
        rows.append(row)
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give one table per network, one of the stages and one of the groups."""
    parts = settings["tables"]
    return [
        *(_by_images(settings, cells, task) for task in settings["tasks"]),
        *(_side_by_side(settings, cells, title, names) for title, names in parts.items()),
    ]


def _of(cells: Cells, task: str, rival: str, samples: int | None) -> list[float]:
    key = {} if samples is None else {"samples": samples}
    return values(cells, "accuracy", task=task, rival=rival, **key)


def _by_images(settings: Settings, cells: Cells, task: str) -> Table:
    images = sorted({c["key"]["samples"] for c in pick(cells, task=task) if "samples" in c["key"]})
    head = ["numbers", "by", "bytes", *(f"{n:,} images" if n else "no data" for n in images)]
    dense = plus_minus([100 * v for v in _of(cells, task, DENSE, None)])
    size = values(cells, "bytes", task=task, rival=DENSE)
    rows = [[DENSE, "", f"{size[0]:,}" if size else "", *[dense] * len(images)]]
    shown = [row for row in settings["rivals"] if task in row["tasks"] and not row.get("apart")]
    for rival, by in dict.fromkeys((row["rival"], row["by"]) for row in shown):
        found = [_of(cells, task, rival, n) for n in images]
        scores = [plus_minus([100 * v for v in row]) if row else "" for row in found]
        sizes = values(cells, "file", task=task, rival=rival)
        sizes = sizes or values(cells, "bytes", task=task, rival=rival)
        rows.append([rival, by, f"{sizes[0]:,}" if sizes else "", *scores])
    return Table(f"{task}, accuracy in %", head, rows)


def _side_by_side(settings: Settings, cells: Cells, title: str, names: list[str]) -> Table:
    task, samples = settings["claims"]["task"], settings["claims"]["samples"]
    rows = []
    for name in names:
        key = {"task": task, "rival": name, "samples": samples}
        accuracy, agreement = (
            plus_minus([100 * v for v in values(cells, word, **key)])
            for word in ("accuracy", "agreement")
        )
        sizes = values(cells, "bytes", task=task, rival=name)
        seconds = values(cells, "seconds", task=task, rival=name, samples=samples)
        spent = f"{mean(seconds):.0f}" if seconds else ""
        size = f"{sizes[0]:,}" if sizes else ""
        rows.append([name, accuracy, agreement, size, spent])
    head = [title, "accuracy, %", "says what float32 says, %", "bytes", "seconds"]
    return Table(f"{title}: {task}, {samples} images", head, rows)
