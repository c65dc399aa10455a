"""Files that may come from anybody: opened only if they are plain ones."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def regular(path: str | Path) -> BinaryIO:
    """Open a file for reading, but no pipe, device or folder: these may hang or never end.

    Raises:
        OSError: there is none, or it is no regular file.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(handle, "rb")
