"""Data that a training method chooses."""
