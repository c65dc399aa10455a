"""Architecture search: what it costs, what it finds, and what random cells reach."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.claim import claim, judged
from bench.compress import scored
from bench.data import cifar10
from bench.experiments import Cell, Cells, Table, by_seed, paired, values
from bench.stats import mean, median, plus_minus, spread
from pliant.compose import resolve
from pliant.data import Data, Train
from pliant.drivers.loop import fit
from pliant.families.search import bilevel as search
from pliant.method import Method
from pliant.nn.cells import CellNetwork
from pliant.nn.genotype import DARTS_V2_WIRING, Genotype, Wiring, chain
from pliant.nn.operations import SKIP
from pliant.registry import construct, plain
from pliant.run import start
from pliant.zoo.darts import DARTS_OPS, DENSE, EDARTS_OPS, evaluation, supernet

Settings = Mapping[str, Any]
Watch = Callable[[dict[str, Any]], None]
SPACES = {"fixed": (DARTS_V2_WIRING, EDARTS_OPS), "dense": (DENSE, DARTS_OPS)}
TIMING, RANDOM, CHAIN = "timing", "random", "chain of"


def cells(settings: Settings) -> list[Cell]:
    """List the timing, the searches and the random cells seed by seed, then the uniform cells."""
    kept = ("side", "images", "channels", "search", "network", "train", "timed_steps")
    shared = {name: settings[name] for name in kept}
    rivals = {
        name: {**given, "method": plain(resolve(given["method"]))}
        for name, given in settings["rivals"].items()
    }
    rows = [Cell({"rival": TIMING}, {**shared, "rivals": rivals})]
    for seed in settings["seeds"]:
        rows += [Cell({"rival": n, "seed": seed}, {**shared, **r}) for n, r in rivals.items()]
        rows.append(Cell({"rival": RANDOM, "seed": seed}, shared))
    uniform = [("all", op) for op in settings["ops"]] + [(CHAIN, settings["claims"]["best"])]
    return rows + [Cell({"rival": kind, "op": op}, shared) for kind, op in uniform]


def measure(cell: Cell, watch: Watch) -> dict[str, Any]:
    """Find a genotype, train it from scratch and score it; or time the steps of both searches."""
    plan, rival, seed = cell.plan, cell.key["rival"], cell.key.get("seed", 0)
    if rival == TIMING:
        return _timing(plan)
    found: dict[str, Any] = {}
    if rival == RANDOM:
        genotype = _random(seed)
    elif "op" in cell.key:
        genotype = _uniform(chain() if rival == CHAIN else DARTS_V2_WIRING, cell.key["op"])
    else:
        genotype, found = _search(plan, seed, watch)
    return {**found, "genotype": genotype.plain(), **_trained(plan, genotype, seed, watch)}


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say what the search costs, that skips do not take over, and that it was worth it."""
    asked = settings["claims"]
    skips, theirs = (by_seed(cells, "skips", rival=name) for name in ("edarts", "darts"))
    ours, darts, drawn = (
        by_seed(cells, "accuracy", rival=name) for name in ("edarts", "darts", RANDOM)
    )
    rank = _rank(cells, asked["best"])
    times = values(cells, "epoch_share", rival=TIMING)
    memory = values(cells, "memory_share", rival=TIMING)
    return [
        claim(
            "An epoch of eDARTS, after its warm-up, as a share of one of DARTS",
            *(mean(times), "<=", asked["epoch_share"], "x"),
        ),
        claim(
            "What a step of eDARTS keeps for its backward pass, as a share of DARTS",
            *(mean(memory), "<", 1, "x"),
        ),
        judged(
            "Skip connections in the normal cell of eDARTS, no limit set, mean over the seeds",
            *(list(skips.values()), "<=", asked["most_skips"], "skips"),
        ),
        judged(
            "Skip connections in the normal cell: eDARTS less DARTS",
            *(paired(skips, theirs), "<", 0, "skips"),
        ),
        judged(
            "The cell of eDARTS, trained from scratch, less that of DARTS",
            *(paired(ours, darts, 100), ">=", -asked["behind_darts"], "points"),
        ),
        judged(
            "The cell of eDARTS less random operations on the same wiring",
            *(paired(ours, drawn, 100), ">", 0, "points"),
        ),
        judged(
            f"Rank of {asked['best']} among cells of a single operation",
            *([] if rank is None else [rank], "<=", asked["rank"], ""),
        ),
    ]


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give mean and standard deviation over the seeds, a row per rival."""
    rows = []
    for rival in (*settings["rivals"], RANDOM):
        row: dict[str, Any] = {"rival": rival}
        for name in ("accuracy", "params", "macs", "skips", "search_seconds"):
            found = values(cells, name, rival=rival)
            if found:
                row[name] = {"mean": mean(found), "sd": spread(found), "seeds": len(found)}
        rows.append(row)
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give the cells that were found or drawn, those of one operation, and the times."""
    return [_found(settings, cells), _ranking(cells), _times(cells)]


# ---------------------------------------------------------------- measuring


def _data(plan: Mapping[str, Any], images: str) -> Data:
    """Some of CIFAR-10, its sides reduced by averaging pixels."""
    counts = plan["images"]
    data = cifar10().subset(train=counts[images], test=counts["test"])
    splits = {name: _shrunk(getattr(data, name), plan["side"]) for name in ("train", "test")}
    return replace(data, **splits)


def _shrunk(split: tuple[Tensor, Tensor], side: int) -> tuple[Tensor, Tensor]:
    images, labels = split
    return F.adaptive_avg_pool2d(images.float(), side).round().to(torch.uint8), labels


def _supernet(plan: Mapping[str, Any], seed: int) -> CellNetwork:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return supernet(*SPACES[plan["wiring"]], cells=plan["cells"], channels=plan["channels"])


def _search(plan: Mapping[str, Any], seed: int, watch: Watch) -> tuple[Genotype, dict[str, Any]]:
    """Search once; the validation half is for the logits only, so that no epoch scores on it."""
    data, train = search.halves(_data(plan, "search"), seed=seed), Train(**plan["search"])
    steps, began = train.steps(data.steps(train.batch)), time.monotonic()
    method = construct(**plan["method"])
    run = start(_supernet(plan, seed), method, data=data, steps=steps, seed=seed)
    fit(run, replace(data, val=None, test=None), train, watch=watch)
    seconds = time.monotonic() - began
    noted = [row for row in run.log if "genotype" in row]
    free, final = noted[-2:]  # after the last epoch without a limit on skips, then with it
    genotype = Genotype.from_plain(final["genotype"])
    return genotype, {
        "skips": free["skips"],
        "reduction_skips": Genotype.from_plain(free["genotype"]).count(SKIP, reduction=True),
        "search_seconds": round(seconds, 2),
        "search_steps": steps,
    }


def _random(seed: int) -> Genotype:
    draw = torch.Generator().manual_seed(seed)
    kinds = []
    for _ in range(2):
        rows = [torch.randint(len(EDARTS_OPS), (2,), generator=draw) for _ in DARTS_V2_WIRING]
        kinds.append(
            tuple(
                tuple((EDARTS_OPS[int(op)], state) for op, state in zip(row, reads, strict=True))
                for row, reads in zip(rows, DARTS_V2_WIRING, strict=True)
            )
        )
    return Genotype(*kinds)


def _uniform(wiring: Wiring, op: str) -> Genotype:
    return Genotype.of(*(tuple((op, state) for state in reads) for reads in wiring))


def _trained(
    plan: Mapping[str, Any], genotype: Genotype, seed: int, watch: Watch
) -> dict[str, Any]:
    """Train the network of a genotype from scratch and score it."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = evaluation(genotype, **plan["network"])
    data, train = _data(plan, "train"), Train(**plan["train"])
    run = start(model, Method(), data=data, steps=train.steps(data.steps(train.batch)), seed=seed)
    began = time.monotonic()
    fit(run, data, train, watch=watch)
    return {**scored(model, data), "seconds": round(time.monotonic() - began, 2)}


def _timing(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Time weight and architecture steps of both searches in turn; count what they keep."""
    batch = plan["search"]["batch"]
    x = torch.randn(batch, 3, plan["side"], plan["side"]).to(memory_format=torch.channels_last)
    labels, rows = torch.arange(batch) % 10, {}
    networks: dict[str, Any] = {
        name: _supernet({**plan, **given}, 0).to(memory_format=torch.channels_last)
        for name, given in plan["rivals"].items()
    }
    taken: dict[str, list[float]] = {}
    for number in range(1 + plan["timed_steps"]):
        for name, network in networks.items():
            pair = _steps(network, x, labels)
            if number:  # the first is to warm up
                for kind, seconds in zip(("weights", "logits"), pair, strict=True):
                    taken.setdefault(f"{kind}_{name}", []).append(seconds)
    found: dict[str, Any] = {name: round(median(row) or 0.0, 4) for name, row in taken.items()}
    for name, network in networks.items():
        every = plan["rivals"][name]["method"]["options"]["every"]
        rows[name] = found[f"weights_{name}"] + found[f"logits_{name}"] / every
        found[f"megabytes_{name}"] = round(_kept(network, x, labels) / 1e6, 1)
        found[f"operations_{name}"] = sum(len(p.ops) for p in search.mixed(network).values())
    shares = {
        "epoch_share": rows["edarts"] / rows["darts"],
        "memory_share": found["megabytes_edarts"] / found["megabytes_darts"],
    }
    return found | {name: round(value, 4) for name, value in shares.items()}


def _steps(network: CellNetwork, x: Tensor, labels: Tensor) -> tuple[float, float]:
    """Seconds of the gradients of a weight step and of a first-order architecture step."""
    began = time.perf_counter()
    F.cross_entropy(network(x), labels).backward()
    middle = time.perf_counter()
    logits = search.architecture(network)
    for logit in logits:
        logit.requires_grad_(True)
    torch.autograd.grad(F.cross_entropy(network(x), labels), logits)
    for logit in logits:
        logit.requires_grad_(False)
    return middle - began, time.perf_counter() - middle


def _kept(network: CellNetwork, x: Tensor, labels: Tensor) -> int:
    """Bytes of the tensors that the graph of a weight step holds, each once, weights left out."""
    own = {p.untyped_storage().data_ptr() for p in (*network.parameters(), *network.buffers())}
    held: dict[int, int] = {}
    keep: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        keep.append(tensor)  # alive, so that no address is used twice
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F.cross_entropy(network(x), labels)
    return sum(size for place, size in held.items() if place not in own)


# ---------------------------------------------------------------- claims and tables


def _ranked(cells: Cells) -> list[tuple[str, float]]:
    rows = [
        (cell["key"]["op"], cell["values"]["accuracy"])
        for cell in cells
        if cell["key"]["rival"] == "all" and "refused" not in cell
    ]
    return sorted(rows, key=lambda row: -row[1])


def _rank(cells: Cells, op: str) -> float | None:
    names = [name for name, _ in _ranked(cells)]
    return names.index(op) + 1 if op in names else None


def _found(settings: Settings, cells: Cells) -> Table:
    head = ["cell", "accuracy, %", "parameters", "skips", "seconds of search"]
    rows = []
    for rival in (*settings["rivals"], RANDOM):
        sizes, seconds = (mean(values(cells, n, rival=rival)) for n in ("params", "search_seconds"))
        rows.append(
            [
                rival,
                plus_minus([100 * v for v in values(cells, "accuracy", rival=rival)]),
                "–" if sizes is None else f"{sizes:,.0f}",
                plus_minus(values(cells, "skips", rival=rival), 1),
                "–" if seconds is None else f"{seconds:.0f}",
            ]
        )
    return Table("Cells that were searched or drawn, trained alike", head, rows)


def _ranking(cells: Cells) -> Table:
    rows = []
    for op, accuracy in _ranked(cells):
        size = mean(values(cells, "params", rival="all", op=op))
        rows.append([op, "fixed", f"{100 * accuracy:.2f}", f"{size:,.0f}"])
    for cell in cells:
        if cell["key"]["rival"] == CHAIN and cell["values"]:
            found = cell["values"]
            accuracy = f"{100 * found['accuracy']:.2f}"
            rows.append([cell["key"]["op"], "chain", accuracy, f"{found['params']:,}"])
    head = ["operation on every edge", "wiring", "accuracy, %", "parameters"]
    return Table("Cells of a single operation, one seed", head, rows)


def _times(cells: Cells) -> Table:
    rows = []
    for name in ("edarts", "darts"):
        row = [
            mean(values(cells, f"{kind}_{name}", rival=TIMING))
            for kind in ("operations", "weights", "logits", "megabytes")
        ]
        rows.append([name, *("–" if v is None else f"{v:.4g}" for v in row)])
    head = ["supernet", "operations", "weight step, s", "architecture step, s", "megabytes kept"]
    return Table("A step of both searches, taken in turn", head, rows)
