"""Rounding networks to few bits: which layers, at which levels, and fitted to the dense ones."""
