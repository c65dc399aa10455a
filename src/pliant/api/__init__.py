"""The verbs: one call each, from what a user has to what a user wants."""

from pliant.api.files import MOST_CLASSES, load
from pliant.api.network import CONTROL, compress
from pliant.api.probe import analyze
from pliant.api.solve import cluster, recover

__all__ = ["CONTROL", "MOST_CLASSES", "analyze", "cluster", "compress", "load", "recover"]
