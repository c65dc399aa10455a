"""Random: the lots are those of the seed."""

import torch

from pliant.methods.prune.random import Random
from pliant.run import start
from pliant.testing import Case
from tests.cases.prune import REFUSES, TOYS, kept, pair


def lots_are_of_the_seed() -> None:
    found = []
    for seed in (0, 0, 1):
        model = pair(*[1.0] * 32)
        run = start(model, Random(), example=(torch.zeros(2, 2),), seed=seed)
        found.append(kept(run)["0", "out"])
    assert found[0] == found[1] != found[2] and len(found[0]) == 16


CASES = (
    Case(
        "random",
        toys=TOYS,
        refuses=REFUSES,
        variants=('random(scope="global", rounds=2)',),
        own=(lots_are_of_the_seed,),
    ),
)
