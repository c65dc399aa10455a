"""From a file to a network, and of an elastic one to the size that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pliant import zoo
from pliant.budget import Budget
from pliant.codecs.container import path_of
from pliant.cost import Cost, Example
from pliant.edits import Edit, Nest
from pliant.edits import sizes as elastic
from pliant.errors import ArtifactError, ModelError
from pliant.files import artifact
from pliant.files.hub import model_file
from pliant.files.manifest import Manifest
from pliant.latency import Target, Where, as_target, measure

MOST_CLASSES = 100_000  # that a file may ask the zoo for
FEW_CLASSES = 1000  # that a file of any size may


def load(
    path: str | Path,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    *,
    at: Budget | str | float | None = None,
    example: Example | Tensor = (),
    target: Where | None = None,
) -> nn.Module:
    """Rebuild a compressed network from its file.

    Nothing in a file can execute anything: without `model` only networks of the zoo are built.

    Args:
        path: a ``.pliant`` file, or a folder with one from `Result.save_pretrained`.
        model: the dense architecture, freshly built, or a function that builds it; may be left
            out for a network of the zoo.
        at: of an elastic network, which size: the largest that this budget allows, or of which
            the parameters are this share of the dense network's. The largest of all if None.
        example: inputs of one forward call, where the budget bounds macs or latency; that of the
            zoo for its networks.
        target: where a latency is measured; PyTorch here if None.

    Raises:
        ArtifactError: the file is missing, damaged, foreign, too new, or of another architecture;
            or a size was asked of a network that has one only, or was compressed further.
        BudgetError: even the smallest size is too large.
    """
    place = None if target is None else as_target(target)
    path = path_of(path)
    path = model_file(path) if path.is_dir() else path
    manifest = artifact.inspect(path)
    dense = model if model is not None else _of_zoo(manifest, path)
    if at is None:
        return artifact.load(path, dense, manifest=manifest)
    given = (example,) if isinstance(example, Tensor) else example
    if not given and model is None and dense is not None:
        given = zoo.NETWORKS[str(manifest.source)].example()
    return _load_at(path, manifest, dense, at, example=given, target=place)


def _of_zoo(manifest: Manifest, path: str | Path) -> Callable[[], nn.Module] | None:
    source = manifest.source
    if source not in zoo.NETWORKS:
        return None
    classes = classes_of(manifest, path)
    return lambda: zoo.build(source, classes=classes)


def classes_of(manifest: Manifest, path: str | Path) -> int | None:
    """Return the classes that a file says its network has; None where it says nothing sensible.

    A class takes a byte of the file at least: a small file cannot ask for a large network.
    """
    classes, most = manifest.extra.get("classes"), max(FEW_CLASSES, Path(path).stat().st_size)
    return classes if type(classes) is int and 0 < classes <= min(MOST_CLASSES, most) else None


def _load_at(
    path: str | Path,
    manifest: Manifest,
    model: nn.Module | Callable[[], nn.Module] | None,
    at: Budget | str | float,
    *,
    example: Example = (),
    target: Target | None = None,
) -> nn.Module:
    """Rebuild the largest size of an elastic network that a budget allows.

    Args:
        path: a file of an elastic network.
        manifest: what it says about itself.
        model: the dense architecture, or a function that builds it.
        at: a budget, or a share of the dense network's parameters.
        example: inputs of one forward call, to count multiply-accumulates and to measure.
        target: where milliseconds are measured; PyTorch here if None.

    Raises:
        ArtifactError: the file holds one size only or was compressed further, or what
            `artifact.load` raises.
        BudgetError: even the smallest size is too large.
        ModelError: the budget bounds what cannot be known without an example.
    """
    budget = _budget(at)
    if {"macs", "latency"} & set(budget.given()) and not example:
        raise ModelError(
            f"A size for {', '.join(budget.given())} needs the inputs of one forward call: pass "
            "example=(inputs,), or bound params or bytes."
        )
    edits = manifest.edits
    if not any(isinstance(edit, Nest) for edit in edits):
        raise ArtifactError(
            f"{path} holds a network of one size: leave at= out, or compress with 'elastic'."
        )
    place = target or Target("torch")
    network = model() if callable(model) and not isinstance(model, nn.Module) else model
    if not isinstance(network, nn.Module):
        return artifact.load(path, network, manifest=manifest)  # which says what it needs
    dense = elastic.counted(network, example)
    if budget.latency is not None:
        dense = replace(dense, latency_ms=measure(network, example, place).median_ms)
    loaded = artifact.load(path, network, manifest=manifest)

    def milliseconds(size: int) -> float:
        return measure(elastic.of_size(loaded, edits, size), example, place).median_ms

    sizes = _Sizes(loaded, edits, example)
    try:
        sizes[0]
    except ArtifactError as error:
        raise ArtifactError(
            f"{path} holds an elastic network that was compressed further, so no size can be cut "
            "from it any more: leave at= out."
        ) from error
    elastic.shrink(loaded, edits, elastic.choose(sizes, budget, dense, milliseconds))
    return loaded


@dataclass(frozen=True)
class _Sizes(Sequence[Cost]):
    """What the sizes of a network cost: each is made when it is asked for, as there may be many."""

    model: nn.Module
    edits: Sequence[Edit]
    example: Example

    def __len__(self) -> int:
        return elastic.count(self.edits)

    def __getitem__(self, size: Any) -> Any:
        number = range(len(self))[size]
        return elastic.counted(elastic.of_size(self.model, self.edits, number), self.example)


def _budget(at: Budget | str | float) -> Budget:
    if isinstance(at, str):
        return Budget.parse(at)
    return at if isinstance(at, Budget) else Budget(params=at)
