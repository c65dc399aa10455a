"""Nearest convex hulls of what a network reads, beside the network itself and its neighbours."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from bench.claim import judged
from bench.compress import compress
from bench.data import mnist
from bench.experiments import Cell, Cells, Table, paired, pick
from bench.small import cnn, method_of, seeded
from bench.stats import mean, plus_minus, spread
from pliant.data import Train
from pliant.families.analyze.features import Features, answers, features, share
from pliant.families.analyze.hulls import fit

Settings = Mapping[str, Any]
Values = dict[str, Any]
TRAINED, OVERFITTED = "trained", "overfitted"
LAST, FULL, DRAWN = "last layer", "full", "200 drawn"
RIVALS = {"centroid": "class means", "nearest": "1 neighbour", "five": "5 neighbours"}
WELL = "Hulls less the network that was trained well"
LIBRARIES = ("mlxtend", "scipy")


def cells(settings: Settings) -> list[Cell]:
    """List the networks, each trained once per seed and asked in all ways."""
    shared = {name: settings[name] for name in ("widths", "hidden", "layers", "hulls")}
    return [
        Cell({"network": name, "seed": seed}, {**shared, **asked})
        for name, asked in settings["networks"].items()
        for seed in settings["seeds"]
    ]


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> Values:
    """Train one network, and label digits by hulls of what it reads."""
    plan, seed = cell.plan, cell.key["seed"]
    data = mnist().subset(train=plan["samples"], seed=seed)
    model = seeded(seed, lambda: network(plan["widths"], plan["hidden"]))
    made = compress(model, data, method_of(""), {}, Train(**plan["train"]), seed=seed, watch=watch)
    names = list(plan["layers"].values())
    trained = features(model, data, "train", names)
    asked = features(model, data, "test", names)
    found: Values = {
        "accuracy": share(asked.right),
        "trained": share(trained.right),
        "params": made["params"],
    }
    for layer, name in plan["layers"].items():
        for how, options in plan["hulls"].items():
            found |= _asked(f"{layer}, {how}", trained, asked, name, options, full=how == FULL)
    return found


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say what the card of the method asks for, in points of accuracy."""
    asked = settings["claims"]
    full, drawn = f"{LAST}, {FULL}", f"{LAST}, {DRAWN}"
    own = {name: _of(cells, name, "accuracy") for name in settings["networks"]}
    hull = {name: _of(cells, name, full) for name in settings["networks"]}
    means = _of(cells, TRAINED, f"{LAST}, centroid")
    sampled = paired(_of(cells, TRAINED, drawn), hull[TRAINED], 100)
    gain = {name: paired(hull[name], own[name], 100) for name in settings["networks"]}
    centroid = paired(means, own[TRAINED], 100)
    return [
        judged(
            "Hulls less the network that was trained well",
            gain[TRAINED],
            ">=",
            asked["trained"],
            "points",
        ),
        judged("Hulls less the overfitted network", gain[OVERFITTED], ">", 0, "points"),
        judged("Class means less the network", centroid, ">=", asked["centroid"], "points"),
        judged("Hulls of 200 drawn less full ones", sampled, ">", asked["sampled"], "points"),
    ]


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give mean and spread over seeds of everything measured."""
    rows = []
    for name in settings["networks"]:
        row: dict[str, Any] = {"network": name}
        for key in _columns(settings, cells):
            found = list(_of(cells, name, key).values())
            if found:
                row[key] = {"mean": mean(found), "sd": spread(found), "seeds": len(found)}
        rows.append(row)
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give the accuracies by network and layer."""
    head = ["labelled by", *settings["networks"]]
    ways = [*settings["hulls"], *RIVALS]
    keys = {"the network": "accuracy", "the network, its training digits": "trained"}
    for layer in settings["layers"]:
        keys |= {f"{RIVALS.get(way, f'hulls, {way}')}, {layer}": f"{layer}, {way}" for way in ways}
    rows = [
        [
            said,
            *(
                plus_minus([100 * v for v in _of(cells, name, key).values()])
                for name in settings["networks"]
            ),
        ]
        for said, key in keys.items()
    ]
    return [Table("Accuracy in %, 1,000 digits", head, rows)]


# ---------------------------------------------------------------- what is measured


def network(widths: list[int], hidden: int) -> nn.Sequential:
    """Build the convolutions of `bench.small.cnn`, a hidden layer and a last one."""
    side = 28 // 2 ** len(widths)
    first = nn.Linear(widths[-1] * side**2, hidden)
    head = nn.Flatten(), first, nn.ReLU(), nn.Linear(hidden, 10)
    return nn.Sequential(*list(cnn(1, widths))[:-3], *head)


def _asked(
    name: str,
    trained: Features,
    asked: Features,
    layer: str,
    options: dict[str, Any],
    *,
    full: bool,
) -> Values:
    """Label by hulls of one layer; by means and neighbours too, which know of no sampling."""
    hulls = fit(trained.layers[layer], trained.labels, **options)
    parts = trained.layers[layer], trained.labels, asked.layers[layer], asked.scores
    said = answers(hulls, *parts)
    found = {name: share(said.hull == asked.labels)}
    if not full:
        return found
    found[f"{name}, several"] = share(said.several)
    prefix = name.removesuffix(FULL)
    rivals = {f"{prefix}{way}": share(getattr(said, way) == asked.labels) for way in RIVALS}
    return found | rivals


def _of(cells: Cells, network: str, key: str) -> dict[Any, float]:
    """Return one value of a network by seed."""
    return {
        cell["key"]["seed"]: cell["values"][key]
        for cell in pick(cells, network=network)
        if key in cell["values"]
    }


def _columns(settings: Settings, cells: Cells) -> list[str]:
    return list(dict.fromkeys(key for cell in pick(cells) for key in cell["values"]))
