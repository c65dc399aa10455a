"""What trunks of weighed skip connections give for inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pliant.cost import call
from pliant.nn.dynamic import DynamicResidualTrunk
from pliant.observe.watch import capture
from pliant.run import Run


def coefficients(run: Run, samples: int) -> dict[str, Tensor]:
    """Return the coefficients of every trunk for training inputs, (inputs, M (M + 1) / 2).

    Args:
        run: of a network with trunks; without data the example is looked at.
        samples: how many inputs at least.
    """
    trunks: dict[str, Any] = {
        f"{name}.coefficients": name
        for name, module in run.model.named_modules()
        if isinstance(module, DynamicResidualTrunk)
    }
    found: dict[str, list[Tensor]] = {name: [] for name in trunks.values()}

    def see(name: str, given: Tensor, output: Tensor) -> None:
        found[trunks[name]].append(output.detach().double())

    with capture(run.model, trunks, see):
        for batch in run.inputs(samples) if run.has_inputs else [run.example]:
            call(run.model, batch)
    return {name: torch.cat(given) for name, given in found.items() if given}
