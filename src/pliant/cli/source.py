"""Reads MODEL: a network of the zoo, a function, or a compressed file."""

import difflib
import importlib
import math
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from pliant import zoo
from pliant.edits import Edit
from pliant.errors import DataError, ModelError, PliantError
from pliant.files import artifact
from pliant.files.load import classes_of
from pliant.math.alone import forked

SUFFIX = ".pliant"
Model = Annotated[str, typer.Argument(help="a zoo name, module:callable, or a .pliant file")]
Architecture = Annotated[
    str | None, typer.Option(help="what builds the dense network of a .pliant file")
]
Weights = Annotated[str | None, typer.Option(help="safetensors file with the network's weights")]
Shape = Annotated[str | None, typer.Option("--input", help="shape of one input, such as 3,32,32")]
MOST_DIMS, MOST_NUMBERS = 6, 2**24  # of an input that a file may ask for


@dataclass(frozen=True)
class Source:
    """A network and where it comes from.

    Attributes:
        name: what reports call it.
        model: the network.
        made_by: what builds the dense network: a zoo name or module:callable.
        edits: what was done to it already.
        trained: whether it came with weights, as far as can be told.
        input: shape of one input, () if not known.
        extra: what its file says beside the weights.
    """

    name: str
    model: nn.Module
    made_by: str
    edits: tuple[Edit, ...] = ()
    trained: bool = True
    input: tuple[int, ...] = ()
    classes: int | None = None


def find(
    spec: str,
    *,
    weights: str | None = None,
    architecture: str | None = None,
    classes: int | None = None,
    seed: int = 0,
) -> Source:
    """Build what MODEL names, random weights drawn from the seed.

    Args:
        spec: a zoo name, ``module:callable``, or a ``.pliant`` file.
        weights: a safetensors file for the first two.
        architecture: what builds the dense network of a file, where its own note cannot be used.
        classes: of a zoo network; its own number if None.
        seed: of random weights.

    Raises:
        ModelError: there is nothing of that name, or it gives no network.
        ArtifactError: the file is damaged or of another architecture.
    """
    with forked(seed=seed):
        if spec.endswith(SUFFIX):
            if weights:
                raise ModelError(
                    f"{spec} holds its own weights: drop --weights, or name a network instead."
                )
            return _file(Path(spec), architecture)
        return _dense(spec, weights, classes or None)


def _dense(spec: str, weights: str | None, classes: int | None) -> Source:
    if spec in zoo.NETWORKS:
        network = zoo.NETWORKS[spec]
        model = zoo.build(spec, classes=classes, weights=weights)
        return Source(
            spec, model, spec, (), weights is not None, network.input, classes or network.classes
        )
    if ":" not in spec:
        near = difflib.get_close_matches(spec, zoo.NETWORKS, n=3)
        asked = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(zoo.NETWORKS)}."
        raise ModelError(
            f"MODEL must be a network of the zoo, module:callable, or a {SUFFIX} file, but "
            f"{spec!r} is none of them; {asked}"
        )
    model = _call(spec)
    if weights:
        zoo.load_weights(model, weights)
    return Source(spec.partition(":")[2], model, spec, classes=classes)


def _file(path: Path, architecture: str | None) -> Source:
    manifest = artifact.inspect(path)
    extra, made_by = manifest.extra, architecture or manifest.source or ""
    classes = classes_of(manifest, path)
    if architecture is None and made_by not in zoo.NETWORKS:
        noted = f" (its note says {made_by!r})" if made_by else ""
        raise ModelError(
            f"{path} holds no code, and its dense network is none of the zoo{noted}: name what "
            "builds it with --architecture module:callable."
        )
    dense = _dense(made_by, None, classes)
    model = artifact.load(path, dense.model)
    shape = extra.get("input")
    sizes = tuple(shape) if isinstance(shape, list) else ()
    known = all(type(size) is int and size > 0 for size in sizes) and len(sizes) <= MOST_DIMS
    known = known and math.prod(sizes) <= MOST_NUMBERS
    return Source(
        path.stem,
        model,
        made_by,
        manifest.edits,
        True,
        sizes if known and sizes else dense.input,
        dense.classes,
    )


def _call(spec: str) -> nn.Module:
    """Call what module:callable names; only ever on the user's own word, never on a file's."""
    module, _, name = spec.partition(":")
    try:
        with _here():
            make: Callable[[], Any] = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module may raise anything while it is imported
        raise ModelError(
            f"MODEL {spec!r} must name a module and a callable in it, but that fails "
            f"({type(error).__name__}: {_line(error)}); "
            "check the spelling and that the module is in this folder or installed."
        ) from error
    model = make if isinstance(make, nn.Module) else _made(spec, make) if callable(make) else make
    if not isinstance(model, nn.Module):
        raise ModelError(f"MODEL {spec!r} must give a torch.nn.Module, not {type(model).__name__}.")
    return model


def _made(spec: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except PliantError:
        raise
    except Exception as error:  # it is not our code
        raise ModelError(
            f"MODEL {spec!r} must give a network when it is called without arguments, but raises "
            f"{type(error).__name__}: {_line(error)}; call it in Python to see where."
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or "no message"


@contextmanager
def _here() -> Any:
    """Let modules of the current folder be imported."""
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())


def example(source: Source, shape: str | None = None, *, data: bool = False) -> tuple[Any, ...]:
    """Make one input of a network: noise of the shape that is known or given as "3,32,32".

    Args:
        source: the network.
        shape: of an input, as it was written.
        data: whether the command has --data.

    Raises:
        DataError: the shape is not known, or cannot be read.
    """
    sizes = source.input
    if shape is not None:
        try:
            sizes = tuple(int(size) for size in shape.replace("x", ",").split(","))
        except ValueError:
            sizes = ()
        if not sizes or min(sizes) < 1:
            raise DataError(f"--input must be sizes such as 3,32,32, not {shape!r}.")
    if not sizes:
        raise DataError(
            f"The input shape of {source.name} is not known: name it with --input 3,32,32"
            f"{', or give --data' if data else ''}."
        )
    return (torch.randn(1, *sizes, generator=torch.Generator().manual_seed(0)),)
