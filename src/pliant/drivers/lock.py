"""One writer for each folder of a run: a lock that names its owner and ends with it."""

import getpass
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pliant.errors import OutputError

NAME = ".pliant.lock"
_HELD: dict[Path, int] = {}  # folders that a thread of this process writes to, and which thread


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Make a folder, and keep other processes and threads from writing a run to it.

    The lock is the operating system's: it ends with its process, however that ends, and a file
    that is left behind locks nobody out. Folders that were made for it and got no file are
    removed again.

    Raises:
        OutputError: another one has it, or the folder cannot be written to.
    """
    place, me = folder.resolve(), threading.get_ident()
    if _HELD.get(place) == me:  # the command line has it already
        yield
        return
    made = _missing(place)
    handle = _locked(folder, place)
    _HELD[place] = me
    try:
        yield
    finally:
        del _HELD[place]
        with suppress(OSError):
            (place / NAME).unlink()
        os.close(handle)
        for empty in made:
            with suppress(OSError):
                empty.rmdir()


def _missing(place: Path) -> list[Path]:
    """The folders that have to be made, the innermost first."""
    return [one for one in (place, *place.parents) if not one.exists()]


def _locked(folder: Path, place: Path) -> int:
    """Take the lock of a folder: a file that stays locked while it is open."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(place / NAME, os.O_RDWR | os.O_CREAT, 0o644)
            if place in _HELD or not _lock(handle):
                owner = os.read(handle, 200).decode(errors="replace").strip()
                os.close(handle)
                raise OutputError(
                    f"{folder} is being written to by {owner or 'another process'}: wait for its "
                    "end, or choose another folder."
                )
            if _same(handle, place / NAME):  # and was not removed by its last owner meanwhile
                break
            os.close(handle)
        os.truncate(handle, 0)
        os.write(handle, _me().encode())
    except OSError as error:
        raise OutputError(
            f"The folder {folder} cannot be written to ({error.strerror or error}): choose "
            "another one."
        ) from error
    return handle


def _lock(handle: int) -> bool:
    """Lock an open file, if nobody else has."""
    try:
        import fcntl
    except ImportError:  # Windows
        return _lock_of_windows(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _lock_of_windows(handle: int) -> bool:
    import importlib

    msvcrt: Any = importlib.import_module("msvcrt")
    try:
        os.lseek(handle, 1 << 20, os.SEEK_SET)  # beyond the name, which others may read
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    finally:
        os.lseek(handle, 0, os.SEEK_SET)
    return True


def _same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _me() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):
        user = "somebody"
    began = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"process {os.getpid()} of {user} on {socket.gethostname()} since {began}"
