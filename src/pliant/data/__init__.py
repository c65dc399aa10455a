"""Data to train, calibrate and measure on, and how long to train."""

from pliant.data.epochs import Epoch
from pliant.data.measures import Metric
from pliant.data.readers import load
from pliant.data.sources import IGNORED, unpack
from pliant.data.splits import Data
from pliant.data.task import Task, batch_of
from pliant.data.train import Train

__all__ = ["IGNORED", "Data", "Epoch", "Metric", "Task", "Train", "batch_of", "load", "unpack"]
