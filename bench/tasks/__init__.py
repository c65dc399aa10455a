"""Tasks: a network, its data, and the dense checkpoint from which every rival starts."""

import hashlib
import importlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from bench.data import ROOT, cifar10, part, some
from pliant import zoo
from pliant.data import Data, Train
from pliant.drivers.loop import fit
from pliant.errors import PliantError
from pliant.method import Method
from pliant.run import start

SHARED = ("task", "network", "weights", "seed", "prepare", "images")  # what a checkpoint is made of
WORK = ROOT / "bench" / ".work"
Watch = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Task:
    """A network and how its dense checkpoint comes about.

    Args:
        name: the module's name.
        network: a name of the zoo.
        prepare: the training that makes the checkpoint, plain and without any method.
        weights: the file below pretrained/ to begin with; random weights without one.
        seed: of random weights and of that training.
        data: what it is trained and scored on.
    """

    name: str
    network: str
    prepare: Train
    weights: str = ""
    seed: int = 0
    data: Callable[[], Data] = cifar10


def get(name: str) -> Task:
    """Return a task by its name.

    Raises:
        PliantError: there is none.
    """
    try:
        found: Task = importlib.import_module(f"bench.tasks.{name.replace('-', '_')}").TASK
    except ModuleNotFoundError:
        known = sorted(p.stem.replace("_", "-") for p in Path(__file__).parent.glob("[!_]*.py"))
        raise PliantError(f"There is no task {name!r}: choose one of {', '.join(known)}.") from None
    return found


def plan(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Write down all that the data and the checkpoint of an experiment depend on."""
    task = get(settings["task"])
    prepare = replace(task.prepare, **settings.get("prepare", {}))
    return {
        "task": task.name,
        "network": task.network,
        "weights": task.weights,
        "seed": task.seed,
        "prepare": asdict(prepare),
        "images": settings.get("images", {}),
    }


def data_of(plan: Mapping[str, Any]) -> Data:
    """Give the data of a plan."""
    return some(get(plan["task"]).data(), plan["images"])


def base(plan: Mapping[str, Any], watch: Watch | None = None) -> nn.Module:
    """Give the dense checkpoint of a plan, trained on the first call and then read from disk."""
    path = base_path(plan)
    if not path.exists():
        _make(plan, path, watch)
    model = zoo.build(plan["network"])
    zoo.load_weights(model, path)
    return model


def base_path(plan: Mapping[str, Any]) -> Path:
    """Say where the checkpoint of a plan is kept: the same for all rivals."""
    own = {name: plan[name] for name in SHARED}
    return WORK / "bases" / f"{plan['task']}-{digest(own)}.safetensors"


def base_facts(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Say how the checkpoint of a plan came about."""
    path = base_path(plan)
    with safe_open(path, framework="pt") as file:
        return dict(json.loads(file.metadata()["facts"]))


def digest(value: Any) -> str:
    """Return a short name of plain data."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _make(plan: Mapping[str, Any], path: Path, watch: Watch | None) -> None:
    train, data, began = Train(**plan["prepare"]), data_of(plan), time.monotonic()
    weights = part("pretrained") / plan["weights"] if plan["weights"] else None
    with torch.random.fork_rng([]):
        torch.manual_seed(plan["seed"])
        model = zoo.build(plan["network"], weights=weights)
    steps = train.steps(data.steps(train.batch))
    run = start(model, Method(), data=data, steps=steps, seed=plan["seed"])
    fit(run, data, train, folder=path.with_suffix(""), resume=True, watch=watch)
    facts = {"seconds": round(time.monotonic() - began, 1), "steps": steps}
    path.parent.mkdir(parents=True, exist_ok=True)
    part_file = path.with_suffix(".part")
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, part_file, {"facts": json.dumps(facts)})
    os.replace(part_file, path)
    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
