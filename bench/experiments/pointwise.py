"""Whether decisions survive shuffling, evidence is faithful, and single taps are enough."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.claim import claim, judged
from bench.compress import compress
from bench.data import cifar10, mnist, part
from bench.experiments import Cell, Cells, Table, paired, pick, values
from bench.small import cnn, method_of, seeded
from bench.stats import mean, plus_minus, spread
from pliant import zoo
from pliant.data import Train
from pliant.errors import require
from pliant.families.analyze.decisions import ORDERS, better, decisions
from pliant.families.analyze.evidence import area
from pliant.families.analyze.heads import find_head
from pliant.families.analyze.inputs import Samples, first
from pliant.families.analyze.kernels import ablated
from pliant.families.analyze.shuffle import decided, shuffled
from pliant.surgery.batchnorm import recalibrate

Settings = Mapping[str, Any]
Values = dict[str, Any]
STAYS = ("agreement", "low", "high", "chance", "blurred")
MEANS, NUMBERS, MLP = "CNN, means", "CNN, all numbers", "MLP"
LARGEST, HALVINGS = 0.25, 20  # of the search for the step that flips a decision
LIBRARIES = ("mlxtend", "scipy")


def cells(settings: Settings) -> list[Cell]:
    """List the networks that are shuffled, then what is done to the pretrained one."""
    plan = dict(settings["shuffle"])
    seeds, networks = plan.pop("seeds"), plan.pop("networks")
    rows = [
        Cell({"study": "shuffle", "network": name, "seed": seed}, plan)
        for name in networks
        for seed in seeds
    ]
    rows.append(Cell({"study": "faithful", "network": "ResNet-20"}, settings["faithful"]))
    taps = dict(settings["taps"])
    keep, draws = taps.pop("keep"), taps.pop("draws")
    for name in keep:
        for seed in range(draws if name == "random" else 1):
            rows.append(Cell({"study": "taps", "network": name, "seed": seed}, taps))
    return rows


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> Values:
    """Measure one cell of one study."""
    studies = {"shuffle": _shuffle, "faithful": _faithful, "taps": _taps}
    return studies[cell.key["study"]](cell)


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say what the hypothesis predicts, and what exact evidence must show."""
    asked = settings["claims"]
    finest = f"agreement {max(settings['shuffle']['parts'])}"
    stay = {name: _of(cells, name, finest) for name in settings["shuffle"]["networks"]}
    rows = [
        judged(
            "Decisions that stay with the finest tiles shuffled, CNN with a head on means",
            list(stay[MEANS].values()), ">=", asked["stays"], "",
        ),
        *(
            judged(
                f"The same less those of the {name}",
                paired(stay[MEANS], stay[name]), ">", asked["order"], "",
            )
            for name in (NUMBERS, MLP)
        ),
    ]  # fmt: skip
    for rival in ORDERS[1:]:
        said = {"random": "in random order", "saliency": "by input gradients"}[rival]
        lead = mean(values(cells, f"lead {rival}", study="faithful"))
        p = mean(values(cells, f"p {rival}", study="faithful"))
        text = f"Area under the deletion curve {said} less that by evidence, ResNet-20"
        rows.append(claim(text, lead, ">=", 0, ""))
        rows.append(claim(f"Chance of that, {said}", p, "<", asked["p"], ""))
    robust = mean(values(cells, "robustness", study="faithful"))
    text = "Spearman of the fewest positions and the smallest flipping step"
    rows.append(claim(text, robust, ">", asked["robust"], ""))
    strongest = mean(values(cells, "accuracy", study="taps", network="dominant"))
    drawn = values(cells, "accuracy", study="taps", network="random")
    lead = [100 * (strongest - value) for value in drawn if strongest is not None]
    text = "Accuracy with the dominant tap of each kernel less that with a random one"
    return [*rows, judged(text, lead, ">", asked["taps"], "points")]


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give mean and spread over seeds of everything measured."""
    groups = dict.fromkeys((c["key"]["study"], c["key"]["network"]) for c in pick(cells))
    rows = []
    for study, network in groups:
        row: dict[str, Any] = {"study": study, "network": network}
        measured = pick(cells, study=study, network=network)
        for key in dict.fromkeys(key for cell in measured for key in cell["values"]):
            found = values(cells, key, study=study, network=network)
            row[key] = {"mean": mean(found), "sd": spread(found), "seeds": len(found)}
        rows.append(row)
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give agreement by tiles, areas under curves, and accuracies by taps."""
    plan = settings["shuffle"]
    head = ["network", "accuracy, %", *(f"{n}x{n}" for n in plan["parts"]), "chance", "blurred"]
    last = max(plan["parts"])
    shuffle = [
        [
            name,
            _said(cells, "accuracy", 1, 100, study="shuffle", network=name),
            *(_stays(cells, name, n) for n in plan["parts"]),
            _said(cells, f"chance {last}", 2, study="shuffle", network=name),
            _said(cells, f"blurred {last}", 2, study="shuffle", network=name),
        ]
        for name in plan["networks"]
    ]
    orders = [
        [
            name,
            *(
                _said(cells, f"{way} {name}", 4, study="faithful")
                for way in ("deletion", "insertion")
            ),
        ]
        for name in ORDERS
    ]
    taps = [
        [name, _said(cells, "accuracy", 1, 100, study="taps", network=name)]
        for name in settings["taps"]["keep"]
    ]
    return [
        Table("Decisions that stay, over seeds [95 % interval over images]", head, shuffle),
        Table("Areas under curves, ResNet-20", ["order", "deletion", "insertion"], orders),
        Table("ResNet-20 with one tap for each kernel", ["kept", "accuracy, %"], taps),
    ]


# ---------------------------------------------------------------- the studies


def _shuffle(cell: Cell) -> Values:
    plan, seed = cell.plan, cell.key["seed"]
    data = mnist().subset(train=plan["samples"], seed=seed)
    model = seeded(seed, lambda: _network(cell.key["network"], plan["widths"]))
    compress(model, data, method_of(""), {}, Train(**plan["train"]), seed=seed)
    images = first(data, data.size("test") or 0)
    plain = decided(model, images).argmax(1)
    found: Values = {"accuracy": float((plain == images.labels).double().mean())}
    for parts in plan["parts"]:
        random = torch.Generator().manual_seed(seed)
        row = shuffled(model, images, parts, plan["permutations"], random)
        found |= {
            f"{name} {parts}": row[name]
            for name in ("agreement", "low", "high", "chance", "blurred")
        }
    return found


def _network(name: str, widths: list[int]) -> nn.Sequential:
    if name == MLP:
        sizes = [784, 256, 128]
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], 10))
    model = cnn(1, widths)
    if name == NUMBERS:
        side = 28 // 2 ** len(widths)
        model = nn.Sequential(*list(model)[:-3], nn.Flatten(), nn.Linear(widths[-1] * side**2, 10))
    return model


def _faithful(cell: Cell) -> Values:
    plan, model = cell.plan, _resnet()
    images = first(cifar10(), plan["images"])
    head = find_head(model, images.inputs[:8])
    random = torch.Generator().manual_seed(0)
    found = decisions(model, head, images, fill="mean", steps=plan["steps"], generator=random)
    areas = {key: area(curve) for key, curve in found.curves.items()}
    best = areas["deletion", "evidence"]
    rows: Values = {f"{way} {order}": float(each.mean()) for (way, order), each in areas.items()}
    for rival in ORDERS[1:]:
        other = areas["deletion", rival]
        rows[f"lead {rival}"] = float((other - best).mean())
        rows[f"p {rival}"] = better(best, other)
    steps = _flips(model, images, found.classes)
    spearman = require("scipy.stats", "bench").spearmanr
    rows["robustness"] = float(spearman(found.points.numpy(), steps.numpy()).statistic)
    rows["points"] = float(found.points.double().median()) / head.positions
    return rows | {"exactness": found.exactness, "step": float(steps.median())}


def _flips(model: nn.Module, images: Samples, classes: Tensor) -> Tensor:
    """Return the smallest step along the sign of the margin's gradient that flips each decision."""
    model.eval()
    rows = []
    for inputs, known in zip(images.inputs.split(50), classes.split(50), strict=True):
        asked = inputs.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(_margin(model(asked), known).sum(), asked)
        low, high = torch.zeros(len(inputs)), torch.full((len(inputs),), LARGEST)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            with torch.no_grad():
                moved = inputs - middle.view(-1, 1, 1, 1) * slope.sign()
                flipped = _margin(model(moved), known) < 0
            low, high = torch.where(flipped, low, middle), torch.where(flipped, middle, high)
        rows.append(high)
    return torch.cat(rows)


def _margin(scores: Tensor, known: Tensor) -> Tensor:
    """How far a score is above the greatest other one."""
    own = scores.gather(1, known[:, None])[:, 0]
    return own - scores.scatter(1, known[:, None], -torch.inf).amax(1)


def _taps(cell: Cell) -> Values:
    plan, keep, data = cell.plan, cell.key["network"], cifar10()
    model = _resnet()
    if keep != "all":
        model = ablated(model, keep, torch.Generator().manual_seed(cell.key["seed"]))
        recalibrate(model, data.calibration(plan["calibration"], batch=256, seed=0))
    images = first(data, plan["images"])
    right = decided(model, images).argmax(1) == images.labels
    return {"accuracy": float(right.double().mean())}


# ---------------------------------------------------------------- what they share


def _resnet() -> nn.Module:
    model = zoo.build("resnet20")
    model.load_state_dict(load_file(part("pretrained") / "resnet20-cifar10.safetensors"))
    return model.eval()


def _of(cells: Cells, network: str, key: str) -> dict[Any, float]:
    """Return one value of a shuffled network by seed."""
    rows = pick(cells, study="shuffle", network=network)
    return {c["key"]["seed"]: c["values"][key] for c in rows if key in c["values"]}


def _said(cells: Cells, key: str, digits: int, scale: float = 1, **which: Any) -> str:
    return plus_minus([scale * value for value in values(cells, key, **which)], digits)


def _stays(cells: Cells, network: str, parts: int) -> str:
    ends = [
        mean(values(cells, f"{end} {parts}", study="shuffle", network=network))
        for end in ("low", "high")
    ]
    if None in ends:
        return "–"
    stays = _said(cells, f"agreement {parts}", 2, study="shuffle", network=network)
    return f"{stays} [{ends[0]:.2f}, {ends[1]:.2f}]"
