"""Tensors in, tensors out: spectra, ranks, factors and penalties, without any module."""
