"""The verbs: one call each, from what a user has to what a user wants."""

from pliant.api.network import CONTROL, MOST_CLASSES, compress, load

__all__ = ["CONTROL", "MOST_CLASSES", "compress", "load"]
