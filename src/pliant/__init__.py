"""Makes PyTorch networks smaller, and proves it: published methods behind one contract.

>>> import pliant
>>> pliant.Budget.parse("params=0.3").params
0.3
"""

from importlib.metadata import PackageNotFoundError, version

from pliant.api import (
    analyze,
    auto,
    cluster,
    compress,
    conclude,
    load,
    recover,
    smallest,
    sweep,
)
from pliant.budget import Budget
from pliant.compose import Stage, chain, together
from pliant.cost import Cost, cost, layer_costs
from pliant.data import Data, Train
from pliant.drivers.loop import evaluate, fit
from pliant.errors import PliantError
from pliant.files.onnx import to_onnx
from pliant.method import Method
from pliant.registry import Entry, Paper, entries, register
from pliant.registry import build as method
from pliant.registry.moved import install
from pliant.result import Finding, Report, Result, Solution
from pliant.run import Run, start

install()

try:
    __version__ = version("pliant")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "unknown"

__all__ = [
    "Budget",
    "Cost",
    "Data",
    "Entry",
    "Finding",
    "Method",
    "Paper",
    "PliantError",
    "Report",
    "Result",
    "Run",
    "Solution",
    "Stage",
    "Train",
    "analyze",
    "auto",
    "chain",
    "cluster",
    "compress",
    "conclude",
    "cost",
    "entries",
    "evaluate",
    "fit",
    "layer_costs",
    "load",
    "method",
    "recover",
    "register",
    "smallest",
    "start",
    "sweep",
    "to_onnx",
    "together",
]
