"""One zip per compressed network: a manifest of plain data, and safetensors beside it.

A file cannot execute anything: it holds JSON and numbers, the edits it names come from a closed
set, and it is checked whole against the given model before that model is touched.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pliant.codecs import tensors as codec
from pliant.codecs.container import (
    MANIFEST as MANIFEST,
)
from pliant.codecs.container import (
    WEIGHTS,
    check_replaceable,
    is_pliant,
    opened,
    pack,
    path_of,
    read,
    read_manifest,
    reading,
)
from pliant.codecs.packing import WIDEST
from pliant.cost import bare
from pliant.edits import Edit, complete, replay
from pliant.errors import ArtifactError, ModelError
from pliant.files.manifest import DTYPES, UNCODED, VERSION, Manifest, Spec, parse, write
from pliant.files.trial import bound, check_bytes, tried
from pliant.nn.align import Align
from pliant.nn.coded import Coded
from pliant.nn.packed import integers

HEADER_LIMIT = 16 * 2**20  # bytes; what safetensors says of the same tensors


# ---------------------------------------------------------------- writing


def save(
    path: str | Path,
    model: nn.Module,
    edits: Iterable[Edit],
    *,
    source: str | None = None,
    extra: Mapping[str, Any] | None = None,
    encode: str | None = None,
) -> Path:
    """Write a compressed network to one file that `load` rebuilds, the same bytes every time.

    Args:
        path: where to; an earlier ``.pliant`` file is replaced, once the new one is complete, and
            a file of another kind is refused.
        model: as the edits have made it. Parametrizations of the dense network, such as weight
            norm, stay: what builds the network puts them on again.
        edits: what was done to the network, in order; what was done before, by an earlier
            compression or in the file that it was loaded from, is put before it.
        source: what builds the dense network, for commands: a zoo name or module:callable.
        extra: plain data to keep beside it: class names, input shape, normalization.
        encode: store each tensor coded, without loss, where that is smaller: ``hac`` by Huffman,
            ``ans`` at the entropy, ``auto`` in whichever is smallest. It pays for numbers of
            which few are distinct: pruned, shared or quantized ones. None stores all as they are.

    Raises:
        EditError: other edits have been made of the network than those given.
        ModelError: the compression is not finished, or the model has state that is not made of
            tensors.
        ArtifactError: `extra` is not plain data.
        OutputError: a file of another kind is there, or the file cannot be written; an existing
            one is as it was.
    """
    path, model = path_of(path), bare(model)
    check_replaceable(path, ".pliant", is_pliant)
    if encode is not None and encode not in codec.CHOICES:
        raise ArtifactError(
            f"Tensors are coded by one of {', '.join(codec.CHOICES)}, or not at all (None), not "
            f"by {encode!r}."
        )
    tensors, aliases = _tensors(model)
    coded = _coded(tensors, encode, integers(model)) if encode else {}
    weights = safetensors.torch.save({**tensors, **coded})
    manifest = Manifest(
        version=VERSION if coded else UNCODED,
        pliant=_own_version(),
        source=source,
        edits=complete(model, tuple(edits)),
        tensors={name: Spec.of(tensor) for name, tensor in tensors.items()},
        aliases=aliases,
        sha256=hashlib.sha256(weights).hexdigest(),
        extra=dict(extra or {}),
        coded={name: len(data) for name, data in coded.items()},
    )
    pack(path, write(manifest), weights)
    return path


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of the state once, on the CPU, and the other names of shared ones."""
    for name, module in model.named_modules():
        if isinstance(module, Align):  # those that the dense network has are built with it again
            raise ModelError(
                f"A file holds a finished network, but a method still computes {name}: call "
                "run.finish() before saving."
            )
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    owners: dict[tuple[Any, ...], str] = {}
    for name, value in sorted(model.state_dict().items()):
        _check_storable(name, value)
        owner = owners.setdefault(_place(name, value), name)
        if owner == name:
            tensors[name] = _alone(value)
        else:
            aliases[name] = owner
    return tensors, aliases


def _check_storable(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ModelError(
            f"A file holds tensors, but the state {name!r} is of type {type(value).__name__}: "
            "keep it in the class that builds the model, or register a buffer."
        )
    dtype = Spec.of(value).dtype
    if dtype not in DTYPES or value.layout != torch.strided or value.is_meta:
        kind = "without data" if value.is_meta else f"of type {dtype}, {value.layout}"
        raise ModelError(
            f"A file holds dense tensors of {', '.join(DTYPES)}, but {name!r} is {kind}: "
            "convert it first."
        )


def _place(name: str, value: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies in memory; an empty one lies nowhere and is only itself."""
    if not value.numel():
        return (name,)
    return value.device, value.data_ptr(), value.dtype, value.shape, value.stride()


def _alone(value: Tensor) -> Tensor:
    value = value.detach().cpu().contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def _coded(
    tensors: Mapping[str, Tensor], choice: str, bits: Mapping[str, int]
) -> dict[str, Tensor]:
    """Code the tensors that are smaller so; packed integers by their own width."""
    packed = {
        name: codec.pack(tensor, choice, bits.get(name, WIDEST)) for name, tensor in tensors.items()
    }
    return {
        name: torch.frombuffer(bytearray(data), dtype=torch.uint8)
        for name, data in packed.items()
        if data is not None
    }


def _own_version() -> str:
    try:
        return version("pliant")
    except PackageNotFoundError:
        return "unknown"


# ---------------------------------------------------------------- reading


def inspect(path: str | Path) -> Manifest:
    """Read what a file says about itself; its weights stay unread.

    Raises:
        ArtifactError: the file is missing, damaged, foreign or too new.
    """
    path = path_of(path)
    with opened(path) as archive, reading(path):
        return parse(read_manifest(archive))


def load(
    path: str | Path,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    *,
    manifest: Manifest | None = None,
) -> nn.Module:
    """Rebuild a compressed network: replay its edits on the dense one, then load the tensors.

    Args:
        path: a file that `save` wrote.
        model: the dense architecture, freshly built, or a function without arguments that
            builds it. It is changed in place, on its device, once the whole file has been
            found to fit; its training mode stays. Types of numbers become those of the file.
        manifest: what `inspect` has read of this very file; read now if None.

    Returns:
        The model, out of what torch.compile or data parallelism put around it.

    Raises:
        ArtifactError: the file is missing, damaged, foreign, too new, or made from another
            architecture. Nothing is loaded then, and the model is as it was.
    """
    path = path_of(path)
    model = _itself(model)
    with opened(path) as archive:
        if manifest is None:
            with reading(path):
                manifest = parse(read_manifest(archive))
        built = _built(path, manifest, model)
        with reading(path):
            trial = tried(manifest, built, model, most=(most := bound(path, built)))
            _compare(manifest, trial)
            check_bytes(manifest, most)
            tensors = _weights(archive, manifest, integers(trial))
            _check_codes(trial, tensors)
    if trial is not built:
        replay(built, manifest.edits, weights=False)
    tensors |= {name: tensors[owner] for name, owner in manifest.aliases.items()}
    for name, own in built.state_dict(keep_vars=True).items():
        if own.dtype != tensors[name].dtype:
            own.data = own.data.to(tensors[name].dtype)
    state = built.state_dict()  # with the versions of its modules, which some of them ask for
    state.update(tensors)
    built.load_state_dict(state)
    return built


def check_fits(path: str | Path, manifest: Manifest, shapes: nn.Module) -> None:
    """Refuse a file that does not fit a network, before one with real tensors is built for it.

    Args:
        path: of the file.
        manifest: what `inspect` has read of it.
        shapes: the dense network on the device "meta"; it stays as it is.

    Raises:
        ArtifactError: the file was made from another architecture, or its edits do not fit.
    """
    path = path_of(path)
    with reading(path):
        _compare(manifest, tried(manifest, shapes, shapes, most=bound(path, shapes)))


def _itself(
    model: nn.Module | Callable[[], nn.Module] | None,
) -> nn.Module | Callable[[], nn.Module] | None:
    """Look through wrappers: of a network, or of what a function builds."""
    if isinstance(model, nn.Module):
        return bare(model)
    if not callable(model):
        return model

    def build() -> Any:
        found = model()
        return bare(found) if isinstance(found, nn.Module) else found

    return build


def _built(
    path: Path, manifest: Manifest, model: nn.Module | Callable[[], nn.Module] | None
) -> nn.Module:
    built = model() if callable(model) and not isinstance(model, nn.Module) else model
    if not isinstance(built, nn.Module):
        raise ArtifactError(
            f"{path} holds no code, so it needs the dense architecture that it was made from "
            f"({manifest.source or 'its source was not noted'}), not {type(built).__name__}: "
            "pass it freshly built, or a function that builds it."
        )
    if any(tensor.is_meta for tensor in (*built.parameters(), *built.buffers())):
        raise ArtifactError(
            f"{path} is loaded into a model with real tensors, but this one is on the meta "
            "device: build it on the device where it shall run."
        )
    return built


# ---------------------------------------------------------------- does it fit?


def _compare(manifest: Manifest, model: nn.Module) -> None:
    """Refuse a model whose tensors, after all edits, are not those of the file."""
    own = model.state_dict(keep_vars=True)
    owners = {name: name for name in manifest.tensors} | dict(manifest.aliases)
    wrong = [text for name in sorted({*own, *owners}) if (text := _differs(name, own, manifest))]
    first: dict[int, str] = {}
    for name, tensor in own.items():
        other = first.setdefault(id(tensor), name)
        if owners.get(name) != owners.get(other):
            wrong.append(f"{other} and {name} are one tensor in the model and two in the file")
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ArtifactError(
            f"was made from another architecture than this {type(model).__name__}: "
            f"{'; '.join(wrong[:3])}{more}. Build the model as it was before it was compressed"
            f"{f' ({manifest.source})' if manifest.source else ''}."
        )


def _differs(name: str, own: Mapping[str, Any], manifest: Manifest) -> str:
    spec = manifest.tensors.get(manifest.aliases.get(name, name))
    if spec is None:
        return f"{name} is not in the file"
    if name not in own:
        return f"{name} is not in the model"
    if not isinstance(own[name], Tensor):
        return f"{name} is no tensor in the model"
    mine = Spec.of(own[name])
    kinds = {DTYPES[spec.dtype].is_floating_point, own[name].dtype.is_floating_point}
    if mine.shape != spec.shape or len(kinds) > 1:
        return f"{name} is {spec} in the file and {mine} in the model"
    return ""


def _weights(
    archive: zipfile.ZipFile, manifest: Manifest, bits: Mapping[str, int]
) -> dict[str, Tensor]:
    """Read the tensors, now that the sizes are known to be those of the model."""
    least = sum(spec.bytes for spec in manifest.stored.values())
    data = read(archive, WEIGHTS, least=least, most=least + HEADER_LIMIT)
    if hashlib.sha256(data).hexdigest() != manifest.sha256:
        raise ArtifactError("is damaged: its weights are not those it was written with.")
    tensors = safetensors.torch.load(data)
    if {name: Spec.of(tensor) for name, tensor in tensors.items()} != manifest.stored:
        raise ArtifactError("is damaged: its tensors are not those that its manifest lists.")
    for name in manifest.coded:
        spec, code = manifest.tensors[name], tensors[name].numpy().tobytes()
        with _of(name):
            width = bits.get(name, WIDEST)
            tensors[name] = codec.unpack(code, spec.shape, DTYPES[spec.dtype], width)
    return tensors


def _check_codes(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse layers whose kernel is coded and would not decode."""
    for name, module in model.named_modules():
        if isinstance(module, Coded) and f"{name}.code" in tensors:
            with _of(name):
                module.check(tensors[f"{name}.code"])


@contextmanager
def _of(name: str) -> Iterator[None]:
    """Say which tensor of the file does not decode."""
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(f"cannot be decoded at {name}: {error}") from error
