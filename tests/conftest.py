"""What all tests share: where the optional data lies, and a cache that outlives a session."""

import functools
import gc
import importlib.metadata
import importlib.util
import os
import signal
from pathlib import Path

import pytest

from pliant.data import Data, load


def data_folder() -> Path | None:
    """Find the folder that holds cifar10-jpeg/ and pretrained/, or None."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PLIANT_DATA") or beside)
    return folder if folder.is_dir() else None


def needs_data(part: str) -> Path:
    """Give a part of the data folder, such as "pretrained", or skip the test and say why."""
    folder = data_folder()
    if folder is None or not (folder / part).exists():
        pytest.skip(f"no {part} in the data folder; set PLIANT_DATA to the folder that holds it")
    return folder / part


@pytest.fixture(scope="session", autouse=True)
def decoded_images_stay(request: pytest.FixtureRequest) -> None:
    """Keep decoded images beside pytest's own cache, not in the user's."""
    os.environ["XDG_CACHE_HOME"] = str(request.config.cache.mkdir("pliant"))


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> None:
    """Let SIGINT interrupt as ever: a job that a shell began in the background ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def fabric_reads_all_packages_once() -> None:
    """Keep the entry points: Fabric asks for them, in hundreds of files, whenever it begins."""
    importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)


@pytest.fixture(scope="session", autouse=True)
def operators_of_onnx_are_listed_once() -> None:
    """Keep the list: PyTorch makes it anew, of hundreds of functions, at every export."""
    if importlib.util.find_spec("onnxscript"):
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))


@pytest.fixture(scope="session", autouse=True)
def what_is_imported_is_no_garbage(operators_of_onnx_are_listed_once: None) -> None:
    """Do not look for garbage among all that is imported, again and again: it stays."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # the whole suite, which trains in any case
        import lightning_fabric  # noqa: F401
    gc.freeze()


@pytest.fixture(scope="session")
def mnist5k(decoded_images_stay: None) -> Data:
    return load("mnist5k")


@pytest.fixture(scope="session")
def digits() -> Data:
    return load("digits")
