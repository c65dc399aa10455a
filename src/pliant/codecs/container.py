"""The zip around a compressed network: two members, written atomically, checked before reading.

A file comes from anywhere. Nothing of it is extracted or unpacked before its members are known
to be the two that belong there and to be no larger than the file can hold.
"""

from __future__ import annotations

import os
import secrets
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from pliant.codecs.disk import regular
from pliant.errors import ArtifactError, EditError, OutputError, must_be

MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"
MANIFEST_LIMIT = 16 * 2**20  # bytes; the largest networks have thousands of tensors: a few MB
MANIFEST_FREE, MANIFEST_GROWTH = 2**20, 200  # bytes, and how often its packed bytes beyond them
GROWTH = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}
"""How many bytes one byte can unpack to, by kind of packing: a larger claim is a lie."""


def pack(path: Path, manifest: bytes, weights: bytes) -> None:
    """Write both members into one zip, the same bytes every time.

    Raises:
        ArtifactError: the manifest is too large to be read back.
        OutputError: the file cannot be written; an existing one is as it was.
    """
    if len(manifest) > MANIFEST_LIMIT:
        raise ArtifactError(
            f"The description of a network may take {MANIFEST_LIMIT:,} bytes, not "
            f"{len(manifest):,}: keep less beside the weights."
        )
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "x") as archive:
        _write(archive, MANIFEST, manifest)
        _write(archive, WEIGHTS, weights)


def path_of(path: Any) -> Path:
    """Take the path of a file.

    Raises:
        ArtifactError: it is none.
    """
    must_be(str | os.PathLike, "A path", path, ArtifactError, "text or a pathlib.Path")
    return Path(path)


def check_replaceable(path: Path, kind: str, known: Callable[[Path], bool]) -> None:
    """Refuse to write where a file of another kind lies; an empty one may go.

    Raises:
        OutputError: there is such a file.
    """
    try:
        held = path.is_file() and path.stat().st_size > 0
    except OSError:  # of the folder: writing will say why
        return
    if held and not known(path):
        raise OutputError(
            f"{path} must be a new file or an earlier {kind} file, but another kind of file is "
            "there: choose another path, or remove it first."
        )


def is_pliant(path: Path) -> bool:
    """Say whether a file has the two members of a ``.pliant`` file; nothing is unpacked."""
    try:
        with opened(path):
            return True
    except ArtifactError:
        return False


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new file beside `path`, which takes its place if all goes well.

    Raises:
        OutputError: it cannot be written. Whatever goes wrong, an existing file stays as it was
            and the new one is removed.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, path)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            _sync(path.parent, os.O_RDONLY)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error.strerror or error}): make room, or choose a "
            "folder that exists and is yours to write to."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    member = zipfile.ZipInfo(name)  # its date is 1980-01-01: the same bytes every time
    member.create_system, member.compress_type = 3, _compression(data)
    if name == MANIFEST and not _unpacks(len(data), len(zlib.compress(data))):
        member.compress_type = zipfile.ZIP_STORED  # or it would look like a bomb
    member.external_attr = 0o644 << 16
    archive.writestr(member, data)


def _compression(data: bytes) -> int:
    """Deflate pays for text and for pruned weights, not for the noise of trained ones."""
    step = max(4096, len(data) // 16)
    sample = b"".join(data[start : start + 4096] for start in range(0, len(data), step))
    pays = len(zlib.compress(sample)) < 0.75 * len(sample)
    return zipfile.ZIP_DEFLATED if pays else zipfile.ZIP_STORED


@contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a file whose members are known to be ours and no larger than they can be."""
    with ExitStack() as stack:
        with reading(path):
            stream = stack.enter_context(regular(path))
            _check_end(stream)
            archive = stack.enter_context(zipfile.ZipFile(stream))
            _check_members(archive)
        yield archive


def _check_end(stream: BinaryIO) -> None:
    """Read the number of members from the last 22 bytes, before any list of them is read."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - 22))
    end = stream.read()
    if len(end) < 22 or end[:4] != b"PK\5\6":
        raise ArtifactError("is cut off or no .pliant file: fetch or write it again.")
    members, listing = struct.unpack("<HL", end[10:16])
    if members != 2 or listing > 1000 or end[20:] != b"\0\0":
        raise ArtifactError(
            f"holds {members} members where a .pliant file has {MANIFEST} and {WEIGHTS}: it comes "
            "from elsewhere. A pickled checkpoint is never opened, since it can run code."
        )


def _check_members(archive: zipfile.ZipFile) -> None:
    members = archive.infolist()
    names = [member.orig_filename for member in members]
    if names != [MANIFEST, WEIGHTS]:
        raise ArtifactError(
            f"holds {', '.join(map(repr, names))[:200]} where a .pliant file has {MANIFEST} and "
            f"{WEIGHTS}: it comes from elsewhere, and nothing of it is opened."
        )
    manifest, weights = members
    if manifest.header_offset:
        raise ArtifactError("has bytes before its manifest: it comes from elsewhere.")
    _check_size(manifest, weights.header_offset)
    _check_size(weights, archive.start_dir)


def _check_size(member: zipfile.ZipInfo, end: int) -> None:
    """Refuse a member that does not fit before `end`, or grows more than its packing can."""
    begin = member.header_offset + 30 + len(member.filename)
    known = member.compress_type in GROWTH and not member.flag_bits
    if not known or begin + member.compress_size > end:
        raise ArtifactError(f"has a damaged or foreign member {member.filename}.")
    if member.file_size > member.compress_size * GROWTH[member.compress_type]:
        raise ArtifactError(f"has a member {member.filename} that claims an impossible size.")


def read_manifest(archive: zipfile.ZipFile) -> bytes:
    """Unpack the manifest: a small file says little."""
    member = archive.getinfo(MANIFEST)
    if not _unpacks(member.file_size, member.compress_size):
        raise ArtifactError(
            f"has a {MANIFEST} that unpacks to {member.file_size:,} bytes: it was made to do harm."
        )
    return read(archive, MANIFEST, least=2, most=MANIFEST_LIMIT)


def _unpacks(size: int, packed: int) -> bool:
    """Whether a manifest may unpack to so much."""
    return size <= max(MANIFEST_FREE, MANIFEST_GROWTH * packed)


def read(archive: zipfile.ZipFile, name: str, *, least: int, most: int) -> bytes:
    """Unpack a member whose size, as it claims, lies within bounds, and is what it claims."""
    size = archive.getinfo(name).file_size
    if not least <= size <= most:
        raise ArtifactError(
            f"has {size:,} bytes of {name} where {least:,} to {most:,} are possible: it is "
            "damaged or comes from elsewhere."
        )
    data = archive.read(name)  # never more than the claim; checks the CRC
    if len(data) != size:
        raise ArtifactError(f"is damaged: its {name} is shorter than it claims.")
    return data


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged or hostile file provokes into one sentence with its name."""
    try:
        yield
    except ArtifactError as error:  # what is raised inside says what is wrong with the file
        raise ArtifactError(f"{path} {error}") from error.__cause__
    except EditError as error:
        raise ArtifactError(f"{path} has an edit that does not fit: {error}") from error
    except FileNotFoundError as error:
        raise ArtifactError(f"There is no file {path}: check the path.") from error
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read ({error.strerror or error}): check that it is a file of yours."
        ) from error
    except _DAMAGE as error:
        raise ArtifactError(
            f"{path} is damaged ({type(error).__name__}: {str(error)[:200]}): "
            "fetch or write it again."
        ) from error


_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, EOFError, struct.error, SafetensorError),
    *(ArithmeticError, LookupError, RuntimeError, TypeError, ValueError),
)
"""What zipfile, zlib, json and safetensors raise on bytes that make no sense."""
