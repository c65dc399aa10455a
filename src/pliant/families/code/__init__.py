"""Few values for many numbers."""
