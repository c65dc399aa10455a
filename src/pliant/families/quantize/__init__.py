"""Fitting rounded networks to the ones they were made from."""
