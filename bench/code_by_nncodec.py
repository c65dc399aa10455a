"""Codes arrays by nncodec and reads them back; runs by itself, in an environment of its own.

nncodec asks for an older NumPy than the benches: `python -m venv` somewhere, `pip install nncodec`
there, and name its interpreter in NNCODEC_PYTHON. It prints the bytes of the stream and its
version. Without the libraries that only its examples use it works as well.
"""

import importlib
import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np

EXAMPLES_ONLY = ("torchvision", "cv2", "ptflops", "h5py", "pandas")


def main(given: str, stream: str, back: str, qp: int) -> None:
    """Read arrays from an .npz, write the stream, and what is read from it as another .npz."""
    for name in EXAMPLES_ONLY:
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = MagicMock(__name__=name, __path__=[], __spec__=None)
    codec = importlib.import_module("nncodec.nnc")
    with np.load(given) as file:
        weights = {name: file[name] for name in file.files}
    codec.compress(weights, bitstream_path=stream, qp=qp, use_dq=True)
    found = codec.decompress(stream, verbose=False)
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in found.items()}
    np.savez(back, **arrays)
    size = Path(stream).stat().st_size
    print(json.dumps({"bytes": size, "version": version("nncodec")}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
