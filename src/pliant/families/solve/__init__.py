"""Solvers of tensors and subspaces: for methods that recover and cluster."""
