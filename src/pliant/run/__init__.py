"""One compression in progress: what changes while it works, and the calls of a training loop."""

from pliant.run.begin import start
from pliant.run.early import FirstSteps
from pliant.run.hooks import Hooks
from pliant.run.progress import RECALIBRATED, ROUTED, Loss, Run

__all__ = ["RECALIBRATED", "ROUTED", "FirstSteps", "Hooks", "Loss", "Run", "start"]
