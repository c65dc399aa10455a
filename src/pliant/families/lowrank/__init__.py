"""Ranks, forms and factors: planned for a budget, and fitted to data."""
