"""`pliant doctor`: what is installed here, and what is missing for what."""

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.text import Text

from pliant.cli import console
from pliant.render import table

EXTRAS = {
    "data": (("datasets", "PIL", "mlxtend", "sklearn"), "data sets by name, image folders"),
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "export, and milliseconds in onnxruntime"),
    "lightning": (("lightning",), "compressing in Lightning's Trainer"),
    "transformers": (("transformers", "accelerate"), "compressing in Transformers' Trainer"),
    "code": (("numba",), "coded files, products of 4-bit codes"),
    "cluster": (("sklearn",), "pliant cluster"),
    "recover": (("tensorly", "sklearn"), "pliant recover"),
    "search": (("sklearn",), "growing stages"),
    "sweep": (("optuna",), "pliant sweep"),
    "hub": (("huggingface_hub",), "sharing on a hub"),
    "log": (("tensorboard", "mlflow", "wandb"), "logs beside the report"),
}


@console.refusals
def doctor(
    as_json: console.AsJson = False,
) -> None:
    """Say which versions, threads, runtimes and extras are here, and what is missing for what."""
    found = look()
    if as_json:
        console.print_json(found)
        return
    shown = console.out()
    facts = table.plain([(name, str(value)) for name, value in found["machine"].items()])
    shown.print(facts)
    for name, row in found["extras"].items():
        missing = ", ".join(row["missing"])
        said = f"missing {missing}: pip install 'pliant[{name}]'" if missing else "here"
        line = Text(f"{name:14}{row['for']}: ")
        shown.print(line.append(said, "yellow" if missing else "green"), soft_wrap=True)


def look() -> dict[str, Any]:
    """Return what is here as plain data."""
    machine = {
        "pliant": _version("pliant"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads",
        "int8 engines": ", ".join(torch.backends.quantized.supported_engines),
        "cuda": torch.version.cuda if torch.cuda.is_available() else "none",
        "compiler": shutil.which("g++") or shutil.which("clang++") or "none (for torch.compile)",
        "onnxruntime": _version("onnxruntime"),
    }
    extras = {
        name: {"for": why, "missing": [each for each in needs if not _there(each)]}
        for name, (needs, why) in EXTRAS.items()
    }
    return {"machine": machine, "extras": extras}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
