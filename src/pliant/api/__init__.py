"""One call each: compress, recover, cluster, analyze, and what is built on these four."""

from pliant.api.job import CONTROL
from pliant.api.own import conclude
from pliant.api.probe import analyze
from pliant.api.shortlist import auto
from pliant.api.solve import cluster, recover
from pliant.api.sweep import sweep
from pliant.api.within import compress, smallest
from pliant.files.load import MOST_CLASSES, load

__all__ = [
    "CONTROL",
    "MOST_CLASSES",
    "analyze",
    "auto",
    "cluster",
    "compress",
    "conclude",
    "load",
    "recover",
    "smallest",
    "sweep",
]
