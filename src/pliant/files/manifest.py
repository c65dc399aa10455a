"""What a compressed file says about itself: plain data, read strictly."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

import torch
from torch import Tensor

from pliant.edits import Edit, from_json, to_json
from pliant.errors import ArtifactError

FORMAT, VERSION = "pliant", 2
MOST_DIMS, MOST_SIZE = 64, 2**48  # of one tensor
UNCODED = 1  # the version of files without coded tensors, which older readers know

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
"""The types of numbers that a file may hold, by name."""


@dataclass(frozen=True)
class Spec:
    """Shape and type of one tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """What the tensor takes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        """Describe a tensor."""
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


@dataclass(frozen=True)
class Manifest:
    """What a file says about itself.

    Attributes:
        version: of the format.
        pliant: version of Pliant that wrote it.
        source: what builds the dense network, or None; never imported here.
        edits: rebuild the compressed network's shape from the dense one.
        tensors: shape and type of every stored tensor, by name.
        aliases: further names of a stored tensor, where layers share it.
        coded: bytes of every tensor that is stored coded, by name.
        sha256: of the weights member.
        extra: plain data that was handed to `save`.
    """

    version: int
    pliant: str
    source: str | None
    edits: tuple[Edit, ...]
    tensors: Mapping[str, Spec]
    aliases: Mapping[str, str]
    sha256: str
    extra: Mapping[str, Any]
    coded: Mapping[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """What the tensors take in memory."""
        return sum(spec.bytes for spec in self.tensors.values())

    @property
    def stored(self) -> dict[str, Spec]:
        """What lies in the file: coded tensors are strings of bytes."""
        coded = {name: Spec((size,), "uint8") for name, size in self.coded.items()}
        return {**self.tensors, **coded}


def write(manifest: Manifest) -> bytes:
    """Return the manifest as JSON, always the same for the same content.

    Raises:
        ArtifactError: ``extra`` is not plain data.
    """
    rows = {
        "format": FORMAT,
        **vars(manifest),
        "edits": to_json(manifest.edits),
        "tensors": {
            name: {"shape": spec.shape, "dtype": spec.dtype}
            for name, spec in manifest.tensors.items()
        },
    }
    if not manifest.coded:
        del rows["coded"]
    try:
        text = json.dumps(rows, sort_keys=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(
            "extra must be plain data, that is strings, finite numbers, lists and dicts with "
            f"string keys, but {error}."
        ) from error
    return text.encode()


def parse(text: bytes) -> Manifest:
    """Read a manifest, accepting only what this version writes.

    Raises:
        ArtifactError: part of a sentence about the file: what is wrong with it.
        EditError: an edit is unknown or malformed.
        ValueError: the text is not JSON.
        RecursionError: it is nested too deeply.
    """
    raw = json.loads(
        text.decode(),
        parse_constant=_refuse_number,
        parse_float=_finite,
        object_pairs_hook=_unique,
    )
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ArtifactError("does not say that it is a .pliant file: it comes from elsewhere.")
    number: Any = raw.get("version")
    if type(number) is int and number > VERSION:
        raise ArtifactError(
            f"has format {number} and this Pliant reads up to {VERSION}: update pliant."
        )
    wanted = _FIELDS if number == VERSION else _FIELDS - {"coded"}
    known = type(number) is int and number in (UNCODED, VERSION)
    _must(known and set(raw) == wanted, "fields")
    tensors, aliases = _specs(raw["tensors"]), raw["aliases"]
    coded = raw.get("coded", {})
    _must(_is_named(coded, int) and set(coded) <= set(tensors), "coded tensors")
    fits = (type(n) is int and 0 < n < tensors[name].bytes for name, n in coded.items())
    _must(all(fits), "coded sizes")
    _must(_is_named(aliases, str), "aliases")
    _must(all(new not in tensors and old in tensors for new, old in aliases.items()), "aliases")
    _must(all(isinstance(raw[key], str) for key in ("pliant", "sha256")), "versions")
    _must(isinstance(raw["source"], str | None) and isinstance(raw["extra"], dict), "source")
    return Manifest(
        version=number,
        pliant=raw["pliant"],
        source=raw["source"],
        edits=tuple(from_json(raw["edits"])),
        tensors=tensors,
        aliases=aliases,
        sha256=raw["sha256"],
        extra=raw["extra"],
        coded=coded,
    )


_FIELDS = {"format", *(field.name for field in fields(Manifest))}


def _specs(rows: Any) -> dict[str, Spec]:
    _must(_is_named(rows, dict), "tensors")
    for row in rows.values():
        _must(set(row) == {"shape", "dtype"} and isinstance(row["shape"], list), "tensors")
        _must(_is_shape(row["shape"]), "shapes")
        _must(isinstance(row["dtype"], str) and row["dtype"] in DTYPES, "types of numbers")
    return {name: Spec(tuple(row["shape"]), row["dtype"]) for name, row in rows.items()}


def _is_shape(sizes: list[Any]) -> bool:
    """Whether a tensor can have these sizes: the product of very many is not even computed."""
    return len(sizes) <= MOST_DIMS and all(
        type(size) is int and 0 <= size < MOST_SIZE for size in sizes
    )


def _is_named(rows: Any, kind: type) -> bool:
    return isinstance(rows, dict) and all(isinstance(row, kind) for row in rows.values())


def _must(holds: bool, what: str) -> None:
    if not holds:
        raise ArtifactError(f"has a manifest with unknown or missing {what}: write it again.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _must(len(dict(pairs)) == len(pairs), "names, since one stands twice")
    return dict(pairs)


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _refuse_number(text)


def _refuse_number(text: str) -> NoReturn:
    raise ArtifactError(f"has a manifest with {text[:20]}, which is not a number of JSON.")
