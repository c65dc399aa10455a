"""What layers and trainings must show one by one: rates, taps, scenes, motions, agreement, peaks.

What is trained is small: each study is of one method, and asks one question.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from bench import studies
from bench.claim import claim, judged
from bench.compress import Values, scored
from bench.data import SMALL
from bench.experiments import Cell, Cells, Table, by_seed, paired
from bench.motions import basic_motions
from bench.scenes import mean_iou, scenes
from bench.small import cnn, method_of, seeded
from bench.stats import mean, plus_minus
from pliant.cost import cost
from pliant.data import Data, Train
from pliant.drivers.loop import epochs_of, fit
from pliant.families.layers import routes
from pliant.families.layers.shifts import attending
from pliant.method import Method
from pliant.methods.distill.ssal import SSAL
from pliant.methods.layers.shift_attention import ShiftAttention
from pliant.methods.train.mltp import MLTP
from pliant.nn.sequences import STDTNN, OuterFusion
from pliant.run import Run, start
from pliant.zoo.fassd import FASSDNet
from pliant.zoo.staged import StagedResNet

Settings = Mapping[str, Any]
Plan = Mapping[str, Any]
Watch = Callable[[dict[str, Any]], None]


def cells(settings: Settings) -> list[Cell]:
    """List the cells of every study, all of the first seed first."""
    rows = []
    for study, plan in settings["studies"].items():
        rest = {k: v for k, v in plan.items() if k not in ("rivals", "seeds", "words", "title")}
        for seed in plan["seeds"]:
            for name, more in plan["rivals"].items():
                rows.append(Cell({"study": study, "rival": name, "seed": seed}, {**rest, **more}))
    return rows


def measure(cell: Cell, watch: Watch) -> Values:
    """Measure one cell of its study."""
    return STUDIES[cell.key["study"]](cell.plan, cell.key["seed"], watch)


def trained(model: nn.Module, method: Method, plan: Plan, data: Data, seed: int) -> Run:
    """Train a network with a method; the run is finished."""
    train = Train(**plan["train"])
    steps = epochs_of(method, data, train, seed=seed).steps
    run = start(model, method, data=data, steps=steps, seed=seed)
    fit(run, data, train)
    run.finish()
    return run


# ---------------------------------------------------------------- shift attention: one tap is left


@dataclass(frozen=True)
class Seen(ShiftAttention):
    """Notes at its end how right the network is before and after one tap is all that is left."""

    data: Any = None

    def finalize(self, run: Run) -> None:
        soft = right(run.model, self.data, [*attending(run)])
        run.note(soft=soft, temperature=float(next(iter(attending(run))).temperature))
        super().finalize(run)
        run.note(hard=right(run.model, self.data, []))


@torch.no_grad()
def right(model: nn.Module, data: Data, soft: Sequence[nn.Module]) -> float:
    """Return the test accuracy while some layers compute as they do in training."""
    model.eval()
    for layer in soft:
        layer.train()
    hits = [(model(x).argmax(1) == labels).float() for x, labels in data.batches("test", 500)]
    return float(torch.cat(hits).mean())


def taps(plan: Plan, seed: int, watch: Watch) -> Values:
    """Train shift attention, and see how many pairs of channels have settled on one tap."""
    source = SMALL[plan["data"]]
    data = source.load(plan["images"])
    model = seeded(seed, lambda: cnn(source.channels, plan["widths"]))
    log = trained(model, Seen(data=data), plan, data, seed).log
    sharp = [row["sharpness"] for row in log if "sharpness" in row]
    rises = sum(b > a for a, b in zip(sharp, sharp[1:], strict=False))
    end = {k: v for row in log for k, v in row.items() if k in ("soft", "hard", "temperature")}
    settled = [row["settled"] for row in log if "settled" in row][-1]
    lost = round(100 * (end["soft"] - end["hard"]), 4)
    return {**end, "settled": settled, "lost": lost, "rises": rises / max(1, len(sharp) - 1)}


# ---------------------------------------------------------------- dmnn: what runs


def routed(plan: Plan, seed: int, watch: Watch) -> Values:
    """Train with gates, or a narrower network of as many products, and score what runs."""
    data = SMALL["cifar10"].load(plan["images"])
    widths = [round(w * plan.get("width", 1.0)) for w in plan["widths"]]
    model = seeded(seed, lambda: StagedResNet((2, 2, 2), widths))
    dense = cost(model, data.example()).macs
    run = trained(model, method_of(plan["spec"]), plan, data, seed)
    found = {"accuracy": scored(model, data)["accuracy"], "macs": dense}
    if not plan["spec"]:
        return found
    gates = seen_gates(run, data)
    share = float(routes.rate_of([gate.mean(0) for gate in gates], run.state["costs"]))
    patterns = len(torch.cat(gates, 1).unique(dim=0))
    macs = dense - (1 - share) * sum(run.state["costs"])
    return found | {"rate": round(share, 4), "patterns": patterns, "macs": round(macs)}


def seen_gates(run: Run, data: Data) -> list[Tensor]:
    """Return the gates of every block for the test images."""
    run.data = replace(data, train=data.test)
    return routes.gates_of(run, len(data.test[0]))


# ---------------------------------------------------------------- fassd_net: scenes


def segmented(plan: Plan, seed: int, watch: Watch) -> Values:
    """Train FASSD-Net or the same encoder with a plain decoder on scenes."""
    size = plan["size"]
    options = {"dilations": tuple(plan["dilations"]), **plan["options"]}
    model: Any = seeded(seed, lambda: FASSDNet(4, **options))
    optimizer = torch.optim.Adam(model.parameters(), plan["lr"])
    rates = torch.optim.lr_scheduler.PolynomialLR(optimizer, plan["steps"], 0.9)
    images, masks = scenes(plan["steps"] * plan["batch"], *size, 1000 + seed)
    for step in range(plan["steps"]):
        rows = slice(step * plan["batch"], (step + 1) * plan["batch"])
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), masks[rows]).backward()
        optimizer.step()
        rates.step()
    x, wanted = scenes(plan["test"], *size, 7)
    with torch.no_grad():
        scores = torch.cat([model.eval()(part) for part in x.split(8)])
    return {"miou": mean_iou(scores.argmax(1), wanted, 4), "params": params(model)}


def params(model: nn.Module) -> int:
    """Count parameters."""
    return sum(p.numel() for p in model.parameters())


def speed(plan: Plan, seed: int, watch: Watch) -> Values:
    """Time the full and the smallest FASSD-Net in turn, one image."""
    nets = {v: FASSDNet(19, v).eval() for v in ("full", "l2")}  # type: ignore[arg-type]
    x, seconds = torch.randn(1, 3, *plan["size"]), dict[str, list[float]](full=[], l2=[])
    with torch.no_grad():
        for _ in range(plan["times"]):
            for name, model in nets.items():
                began = time.process_time()
                model(x)
                seconds[name].append(time.process_time() - began)
    least = {name: min(found) for name, found in seconds.items()}
    ms = {f"ms_{name}": round(1000 * value, 1) for name, value in least.items()}
    return ms | {"ratio": round(least["l2"] / least["full"], 4)}


# ---------------------------------------------------------------- space-time tensors: motions


def motions(plan: Plan, seed: int, watch: Watch) -> Values:
    """Tell motions apart from forty sequences, or from a few of each class."""
    split = basic_motions()
    x, labels = few(*split["train"], plan.get("each", 10), seed)
    test, wanted = split["test"]
    if plan["kind"] == "raw":
        known = LogisticRegression(max_iter=1000).fit(x.flatten(1).numpy(), labels.numpy())
        accuracy = known.score(test.flatten(1).numpy(), wanted.numpy())
        return {"accuracy": float(accuracy), "params": known.coef_.size + known.intercept_.size}
    model = seeded(seed, lambda: sequences(plan["kind"]))
    features: Any = model.features if isinstance(model, STDTNN) else model[0]  # type: ignore[index]
    features.fit_init(x, labels)
    optimizer = torch.optim.Adam(model.parameters(), plan["lr"])
    for _ in range(plan["steps"]):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    with torch.no_grad():
        hits = (model.eval()(test).argmax(1) == wanted).float().mean()
    return {"accuracy": float(hits), "params": params(model)}


def few(x: Tensor, labels: Tensor, each: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw so many sequences of each class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rows = torch.cat([order[labels[order] == k][:each] for k in range(4)])
    return x[rows], labels[rows]


def sequences(kind: str) -> nn.Module:
    """Build the factorized network, or the same with dense weights on the fused tensor."""
    model = STDTNN(2, 3, 4)
    if kind == "factorized":
        return model
    inner = model.features.size + 1
    dense = nn.Linear(inner**2, 16, bias=False)
    return nn.Sequential(model.features, OuterFusion(), dense, nn.Tanh(), nn.Linear(16, 4))


# ---------------------------------------------------------------- trainings


@dataclass(frozen=True)
class Agreement(MLTP):
    """Notes now and then how alike the gradients of two random batches are."""

    every: int = 10
    data: Any = None

    def after_step(self, run: Run) -> None:
        if run.step % self.every == 0:
            run.note(cosine=alike(run.model, self.data, run.step))


def alike(model: nn.Module, data: Data, step: int, size: int = 64, pairs: int = 4) -> float:
    """Return the mean cosine of the gradients of two batches, over some pairs of a seed."""
    draw, (x, labels) = torch.Generator().manual_seed(step), data.train
    weights, found, mode = [*model.parameters()], [], model.training
    model.eval()
    for _ in range(pairs):
        rows = torch.randperm(len(x), generator=draw)[: 2 * size].split(size)
        both = [gradient(model, prepared(data, x[r]), labels[r].long(), weights) for r in rows]
        found.append(float(F.cosine_similarity(*both, dim=0)))
    model.train(mode)
    return sum(found) / pairs


def gradient(model: nn.Module, x: Tensor, labels: Tensor, weights: list[Any]) -> Tensor:
    """Return the gradient of the loss in one row."""
    loss = F.cross_entropy(model(x), labels)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])


def prepared(data: Data, x: Tensor) -> Tensor:
    """Return images as a network gets them."""
    return next(iter(replace(data, train=(x, torch.zeros(len(x)))).batches("train", len(x))))[0]


def agreement(plan: Plan, seed: int, watch: Watch) -> Values:
    """Train with the second batch and without, and see how alike gradients of batches are."""
    data = SMALL["digits"].load(plan["images"])
    model = seeded(seed, lambda: cnn(1, plan["widths"]))
    method = Agreement(beta=plan["beta"], every=plan["every"], data=data)
    log = trained(model, method, plan, data, seed).log
    seen = [row["cosine"] for row in log if "cosine" in row]
    return {"cosine": round(sum(seen) / len(seen), 5), "accuracy": scored(model, data)["accuracy"]}


def growth(plan: Plan, seed: int, watch: Watch) -> Values:
    """Train in steps of growing data or on all of them, and look at the ends of steps."""
    data = SMALL["digits"].load(plan["images"])
    data = replace(data, val=data.test)
    model = seeded(seed, lambda: cnn(1, plan["widths"]))
    began = time.process_time()
    log = trained(model, method_of(plan["spec"]), plan, data, seed).log
    spent = time.process_time() - began
    scores = [row["accuracy"] for row in log if row.get("accuracy") is not None]
    each = len(scores) // 4
    rises = [scores[each * k] - scores[each * k - 1] for k in (1, 2, 3)] if each else []
    samples = [row["samples"] for row in log if "samples" in row]
    return {
        "seconds": round(spent, 3),
        "accuracy": scores[-1],
        **{f"rise_{k + 1}": round(100 * rise, 3) for k, rise in enumerate(rises)},
        **({"samples": samples[-1]} if samples else {}),
    }


def peaks(plan: Plan, seed: int, watch: Watch) -> Values:
    """Train with a rate of dropping or without, and see how far the largest unit stands out."""
    data = SMALL["digits"].load(plan["images"])
    model = seeded(seed, lambda: cnn(1, plan["widths"]))
    trained(model, method_of(plan["spec"]), plan, data, seed)
    found: list[Tensor] = []
    layer = [m for m in model if isinstance(m, nn.ReLU)][-1]  # type: ignore[union-attr]
    hook = layer.register_forward_hook(lambda m, a, out: found.append(out.detach().flatten(1)))
    row = scored(model, data)
    hook.remove()
    maps = torch.cat([x for x in found if len(x) > 1])
    stands = maps.amax(1) / maps.mean(1).clamp_min(1e-12)
    return {"accuracy": row["accuracy"], "peak": round(float(stands.mean()), 4)}


@dataclass(frozen=True)
class Judged(SSAL):
    """Notes at its end how right the network is alone and with its heads, on test images."""

    def finalize(self, run: Run) -> None:
        run.data = replace(run.data, val=run.data.test) if run.data else None
        super().finalize(run)


def heads(plan: Plan, seed: int, watch: Watch) -> Values:
    """Train with heads on groups of classes, or without any; mistakes are counted apart."""
    data = SMALL["digits"].load(plan["images"])
    (x, labels), held = data.train, plan["held"]
    data = replace(data, train=(x[held:], labels[held:]), val=(x[:held], labels[:held]))
    model = seeded(seed, lambda: cnn(1, plan["widths"]))
    method = Judged(**plan["options"]) if plan["options"] else Method()
    log = trained(model, method, plan, data, seed).log
    found = [row["joint"] for row in log if "joint" in row]
    return {"accuracy": scored(model, data)["accuracy"], **({"joint": found[-1]} if found else {})}


STUDIES: dict[str, Callable[[Plan, int, Watch], Values]] = {
    "taps": taps,
    "routes": routed,
    "scenes": segmented,
    "speed": speed,
    "motions": motions,
    "agreement": agreement,
    "growth": growth,
    "peaks": peaks,
    "heads": heads,
}


# ---------------------------------------------------------------- what it says


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Compare values with targets, of one rival or of two by the seeds that they share."""
    return [_judged(asked, cells) for asked in settings["claims"]]


def _judged(asked: Mapping[str, Any], cells: Cells) -> dict[str, Any]:
    value, study = asked["value"], asked["study"]
    own = by_seed(cells, value, study=study, rival=asked["own"])
    scale, found = asked.get("scale", 1.0), [*own.values()]
    if "other" in asked:
        other = by_seed(cells, asked.get("as", value), study=study, rival=asked["other"])
        if asked.get("ratio"):
            found = [own[seed] / other[seed] for seed in own if seed in other]
        else:
            found = paired(own, other, scale)
    elif "near" in asked:
        found = [abs(value - asked["near"]) for value in found]
    rest = asked["how"], asked["target"], asked["unit"]
    if asked.get("counted"):
        return claim(asked["text"], mean(found), *rest)
    return judged(asked["text"], found, *rest)


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give the means of what was measured."""
    return studies.summary(settings, cells)


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give a table for each study."""
    return studies.tables(settings, cells, _said)


def _said(rows: list[Any], key: str) -> str:
    if key in ("accuracy", "joint", "settled", "miou", "rises"):
        return plus_minus([100 * value for value in rows])
    if key in ("params", "macs", "samples"):
        return f"{mean(rows):,.0f}" if rows else "–"
    return plus_minus(rows, 3)
