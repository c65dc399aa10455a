"""Takes the class scores out of what a model gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pliant.errors import ModelError


def logits(output: Any) -> Tensor:
    """Take the class scores out of what a model gives.

    Raises:
        ModelError: there are none.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    raise ModelError(
        f"The model must give a tensor or something with logits, not {type(output).__name__}; "
        "wrap it, or train it with your own loop."
    )
