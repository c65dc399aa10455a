"""What searches must show one by one: devices, sizes, steps, choices, and predicted milliseconds.

What is trained is small: each study is of one method, and asks one question.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn
from torch.optim import SGD

from bench import studies
from bench.claim import claim, judged
from bench.compress import Values, compress, scored
from bench.data import SMALL
from bench.experiments import Cell, Cells, Table, by_seed, paired, pick, values
from bench.experiments.search_family import last, short, with_ops
from bench.merged import merged, mixture, step_seconds
from bench.small import method_of, seeded
from bench.stats import mean, median, plus_minus
from pliant.cost import cost
from pliant.data import Data, Train
from pliant.drivers.loop import fit
from pliant.families.search.bilevel import halves
from pliant.families.search.expected import expected
from pliant.latency import LatencyTable, Target
from pliant.latency import measure as timed
from pliant.method import Method
from pliant.nn.mobile import MBConv, Space
from pliant.run import Run, start
from pliant.zoo import mobile
from pliant.zoo.staged import StagedResNet

Settings = Mapping[str, Any]
Watch = Callable[[dict[str, Any]], None]


def cells(settings: Settings) -> list[Cell]:
    """List the cells of every study, all of the first seed first."""
    rows = []
    for study, plan in settings["studies"].items():
        rest = {k: v for k, v in plan.items() if k not in ("rivals", "seeds", "words")}
        for seed in plan["seeds"]:
            for name, more in plan["rivals"].items():
                rows.append(Cell({"study": study, "rival": name, "seed": seed}, {**rest, **more}))
    return rows


def measure(cell: Cell, watch: Watch) -> Values:
    """Measure one cell of its study."""
    return STUDIES[cell.key["study"]](cell.plan, cell.key["seed"], watch)


# ---------------------------------------------------------------- two devices


def made_up(kernels: float, expansions: float) -> Any:
    """Make up a device: so many milliseconds for every tap of a filter's side, and every factor."""

    def seconds(model: nn.Module, example: Any) -> float:
        total = 0.5 if isinstance(model, nn.Conv2d | nn.Linear) else 0.0
        for part in (m for m in model.modules() if isinstance(m, MBConv)):
            convs = [m for m in part.layers if isinstance(m, nn.Conv2d)]
            deep = next(m for m in convs if m.groups > 1)
            factor = deep.groups / convs[0].in_channels
            total += kernels * deep.kernel_size[0] + expansions * factor
        return total / 1000

    return seconds


def devices(plan: Mapping[str, Any], seed: int, watch: Watch) -> Values:
    """Search for one of two devices, take the time on both, and train what was found."""
    space, data = Space.from_plain(plan["space"]), images(plan)
    target = made_up(*plan["devices"][plan["device"]])
    ops = last(searched(space, data, plan, seed, watch, target), "ops")
    found = {f"ms_{n}": on(space, ops, data, made_up(*d)) for n, d in plan["devices"].items()}
    return (
        trained(mobile.evaluation(space, ops), data, plan, seed, watch) | found | {"is": short(ops)}
    )


def searched(
    space: Space, data: Data, plan: Mapping[str, Any], seed: int, watch: Watch, target: Any = None
) -> Run:
    """Search among blocks, one half of the images for the logits."""
    parts, train = replace(halves(data, seed=seed), test=None), Train(**plan["search"])
    model = seeded(seed, lambda: mobile.supernet(space))
    steps = train.steps(parts.steps(train.batch))
    spec = method_of(plan["spec"])
    run = start(model, spec, data=parts, steps=steps, seed=seed, target=target)
    fit(run, replace(parts, val=None), train, watch=watch)
    run.finish(strict=False)
    return run


def on(space: Space, ops: list[str], data: Data, device: Any) -> float:
    """Return the predicted milliseconds of an architecture on a made-up device."""
    table = LatencyTable.of(Target.of(device))
    supernet = mobile.supernet(space)
    prices = expected(supernet, data.example(), "latency", table)
    return round(prices.at(dict(zip(prices.prices, ops, strict=True)), supernet), 4)


# ---------------------------------------------------------------- beside MobileNetV2


def scaled(plan: Mapping[str, Any], seed: int, watch: Watch) -> Values:
    """Train what a search found on the target, or MobileNetV2's blocks at a width."""
    space, data = Space.from_plain(plan["space"]), images(plan)
    if "width" in plan:
        model, said = uniform(space, plan["width"]), f"k3_e6, width {plan['width']:g}"
    else:
        run = searched(space, data, plan, seed, watch, plan["target"])
        ops = last(run, "ops")
        model, said = mobile.evaluation(space, ops), short(ops)
    found = trained(model, data, plan, seed, watch) | {"is": said}
    return found | milliseconds(model, data, plan["target"])


def uniform(space: Space, width: float) -> nn.Module:
    """Build the network whose blocks are all of kernel 3 and expansion 6, at a width."""
    alike = with_ops(space, ["mbconv_k3_e6"])
    stages = tuple(replace(s, channels=max(2, round(s.channels * width))) for s in alike.stages)
    return mobile.supernet(replace(alike, stem=max(2, round(space.stem * width)), stages=stages))


def milliseconds(model: nn.Module, data: Data, target: str) -> Values:
    """Measure a network on a target, and predict it as the sum of its layers by the table."""
    place, model = Target.parse(target), model.eval()
    table = LatencyTable.of(place)
    predicted = expected(model, data.example(), "latency", table).fixed
    return {
        "ms": round(timed(model, data.example(), place).median_ms, 4),
        "predicted_ms": round(predicted, 4),
    }


def ranked(plan: Mapping[str, Any], seed: int, watch: Watch) -> Values:
    """Predict and measure random networks of a space."""
    space, data, draw = Space.from_plain(plan["space"]), images(plan), torch.Generator()
    draw.manual_seed(seed)
    rows = []
    for number in range(plan["networks"]):
        model = mobile.evaluation(space, mobile.random(space, draw))
        rows.append(milliseconds(model, data, plan["target"]))
        watch({"network": number + 1})
    pairs = [(row["predicted_ms"], row["ms"]) for row in rows]
    return {
        "spearman": round(float(spearmanr(*zip(*pairs, strict=True)).statistic), 4),
        "rows": rows,
    }


# ---------------------------------------------------------------- merged kernels


def steps(plan: Mapping[str, Any], seed: int, watch: Watch) -> Values:
    """Time steps of merged kernels, and of a mixture of what each kernel gives, in turn."""
    sizes = tuple(plan["sizes"])
    space = with_ops(Space.from_plain(plan["space"]), [f"mbconv_k{sizes[-1]}_e3"])
    nets: dict[str, nn.Module] = {"plain": seeded(seed, lambda: mobile.supernet(space))}
    nets["merged"] = seeded(seed, lambda: merged(mobile.supernet(space), sizes))
    nets["mixture"] = seeded(seed, lambda: mixture(mobile.supernet(space), sizes))
    x = torch.randn(plan["batch"], space.inputs, plan["side"], plan["side"])
    labels = torch.arange(plan["batch"]) % 10
    seconds: dict[str, list[float]] = {name: [] for name in nets}
    for number in range(plan["steps"] + 1):
        for name, model in nets.items():
            took = step_seconds(model, x, labels)
            seconds[name] += [took] if number else []
    found = {f"ms_{n}": round(1000 * (median(s) or 0), 2) for n, s in seconds.items()}
    macs = {f"macs_{n}": cost(m, (x[:1],)).macs for n, m in nets.items()}
    return found | macs | {"ratio": round(found["ms_merged"] / found["ms_mixture"], 4)}


def sizes(plan: Mapping[str, Any], seed: int, watch: Watch) -> Values:
    """Search the size of the one convolution that tells two classes of noise apart."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 2)),
    )
    data, count = pairs_of(seed, plan["extent"]), plan["steps"]
    run = start(model, method_of(plan["spec"]), data=data, steps=count, seed=seed)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], 0.1, 0.9)
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(model(data.train[0]), data.train[1]).backward()
        optimizer.step()
        run.after_step()
    run.finish()
    size = next(iter(last(run, "sizes").values()))
    return {"size": size, "right": float(size == plan["wanted"])}


def pairs_of(seed: int, extent: int) -> Data:
    """Make noise whose pixels are alike or opposite at a distance that fits into an extent."""
    draw, labels = torch.Generator().manual_seed(seed), torch.arange(512) % 2
    noise = torch.randn(512, 1, 13, 13, generator=draw)
    noise = noise + (2.0 * labels - 1)[:, None, None, None] * noise.roll(extent - 1, -1)
    return Data((noise[:256], labels[:256]), (noise[256:], labels[256:]), classes=2)


def kernels(plan: Mapping[str, Any], seed: int, watch: Watch) -> Values:
    """Train networks of kernels that were searched, of one size, or drawn."""
    space, data = Space.from_plain(plan["space"]), images(plan)
    largest = with_ops(space, [f"mbconv_k{s}_e3" for s in (3, 5, 7)])
    many = len(list(space.blocks()))
    if "size" in plan:
        ops = [f"mbconv_k{plan['size']}_e3"] * many
    elif "draw" in plan:
        draw = torch.Generator().manual_seed(100 * seed + plan["draw"])
        ops = list(mobile.random(largest, draw))
    else:
        one = with_ops(space, ["mbconv_k3_e3"])
        run = searched(one, data, plan, seed, watch)
        ops = [f"mbconv_k{size}_e3" for size in last(run, "sizes").values()]
    return trained(mobile.evaluation(largest, ops), data, plan, seed, watch) | {"is": short(ops)}


# ---------------------------------------------------------------- which stage grows


def stages(plan: Mapping[str, Any], seed: int, watch: Watch) -> Values:
    """Grow stages by importance or at random, and train what was found."""
    data, train, widths = images(plan), Train(**plan["search"]), tuple(plan["widths"])
    model = seeded(seed, lambda: StagedResNet((2, 2, 2), widths))
    count = train.steps(data.steps(train.batch))
    held = replace(data, test=None)
    run = start(model, method_of(plan["spec"]), data=held, steps=count, seed=seed)
    fit(run, held, train, watch=watch)
    run.finish(strict=False)
    depths = tuple(last(run, "depths"))
    found = {"is": " ".join(map(str, depths)), "blocks": sum(depths)}
    return trained(StagedResNet(depths, widths), data, plan, seed, watch) | found


# ---------------------------------------------------------------- what all share


def images(plan: Mapping[str, Any]) -> Data:
    """Give the images of a study."""
    return SMALL[plan["data"]].load(plan["images"])


def trained(
    model: nn.Module, data: Data, plan: Mapping[str, Any], seed: int, watch: Watch
) -> Values:
    """Train an architecture from weights of the seed, in place, and score it."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for part in model.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
    compress(model, data, Method(), {}, Train(**plan["train"]), seed=seed, watch=watch)
    row = scored(model, data)
    return {name: row[name] for name in ("accuracy", "params", "macs")}


STUDIES: dict[str, Callable[[Mapping[str, Any], int, Watch], Values]] = {
    "devices": devices,
    "scaled": scaled,
    "ranks": ranked,
    "steps": steps,
    "sizes": sizes,
    "kernels": kernels,
    "stages": stages,
}


# ---------------------------------------------------------------- what it says


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Judge every study by its question."""
    rows = [row for ask in (_devices, _scaled, _steps, _sizes) for row in ask(settings, cells)]
    rows += [
        claim(
            f"vpu_nas: Spearman of predicted and measured milliseconds, {name}",
            value,
            ">=",
            0.85,
            "",
        )
        for name in settings["studies"]["ranks"]["rivals"]
        for value in values(cells, "spearman", study="ranks", rival=name)[:1] or [None]
    ]
    found = by_seed(cells, "accuracy", study="kernels", rival="ednas")
    beaten = [len(better(cells, seed)) for seed in found]
    rows.append(
        judged("ednas: networks as cheap that are as accurate", beaten, "<=", 0, "networks")
    )
    own, other = (
        by_seed(cells, "accuracy", study="stages", rival=name) for name in ("importance", "random")
    )
    text = "stage_wise: growth by importance less growth at random"
    return [*rows, judged(text, paired(own, other, 100), ">=", 0, "points")]


def _devices(settings: Settings, cells: Cells) -> Iterator[dict[str, Any]]:
    names = list(settings["studies"]["devices"]["rivals"])
    for name, foreign in itertools.permutations(names):
        own, other = (
            by_seed(cells, f"ms_{name}", study="devices", rival=who) for who in (name, foreign)
        )
        found = [own[seed] / other[seed] for seed in own if seed in other]
        text = f"vpu_nas: time on the device of {name} over that of the other device's network"
        yield judged(text, found, "<", 1, "x")
    one, two = (by_seed(cells, "accuracy", study="devices", rival=name) for name in names)
    apart = [abs(value) for value in paired(one, two, 100)]
    yield judged("vpu_nas: networks of two devices differ by", apart, "<=", 1.5, "points")


def _scaled(settings: Settings, cells: Cells) -> Iterator[dict[str, Any]]:
    found = []
    for seed in settings["studies"]["scaled"]["seeds"]:
        rows = pick(cells, study="scaled", seed=seed)
        own = [c["values"] for c in rows if c["key"]["rival"] == "vpu_nas"]
        wide = [c["values"] for c in rows if c["key"]["rival"] != "vpu_nas"]
        if own and wide:
            found.append(own[0]["predicted_ms"] / reached(own[0]["accuracy"], wide))
    text = "vpu_nas: predicted milliseconds over those of MobileNetV2's blocks as accurate"
    yield judged(text, found, "<=", 0.95, "x")


def reached(accuracy: float, wide: list[Values]) -> float:
    """Return the least milliseconds of those at least as accurate; the most of all if none is."""
    fast = [row["predicted_ms"] for row in wide if row["accuracy"] >= accuracy]
    return min(fast) if fast else max(row["predicted_ms"] for row in wide)


def _steps(settings: Settings, cells: Cells) -> Iterator[dict[str, Any]]:
    key = {"study": "steps"}
    ratio = median(values(cells, "ratio", **key))
    yield claim("ednas: time of a step over that of a mixture", ratio, "<", 1, "x")
    rows = [cell["values"] for cell in pick(cells, **key)]
    more = [row["macs_merged"] / row["macs_plain"] for row in rows]
    yield claim("ednas: products over those of one largest kernel", median(more), "<=", 1, "x")


def _sizes(settings: Settings, cells: Cells) -> Iterator[dict[str, Any]]:
    for name, plan in settings["studies"]["sizes"]["rivals"].items():
        found = values(cells, "right", study="sizes", rival=name)
        hits = sum(found) if found else None
        yield claim(
            f"ednas: seeds of 10 that find {plan['wanted']}, {name}", hits, ">=", 8, "seeds"
        )


def better(cells: Cells, seed: int) -> list[str]:
    """Name the networks of kernels that cost no more than the found one and are as accurate."""
    rows = {c["key"]["rival"]: c["values"] for c in pick(cells, study="kernels", seed=seed)}
    own = rows.pop("ednas", None)
    return [
        name
        for name, row in rows.items()
        if own and row["accuracy"] >= own["accuracy"] and row["macs"] <= own["macs"]
        and row["is"] != own["is"]
    ]  # fmt: skip


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give the means of what was measured."""
    return studies.summary(settings, cells)


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give a table for each study."""
    return studies.tables(settings, cells, _said)


def _said(rows: list[Any], key: str) -> str:
    if not rows or isinstance(rows[0], str):
        return "; ".join(map(str, rows)) or "–"
    if key == "accuracy":
        return plus_minus([100 * value for value in rows])
    if key in ("params", "macs"):
        return f"{mean(rows) or 0:,.0f}"
    if key == "right":
        return f"{sum(rows):.0f} of {len(rows)}"
    return plus_minus(rows, 3)
