"""Pliant makes PyTorch networks smaller and measurably faster."""
