"""In what precision a loop trains a network."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn


class Precision:
    """Remembers in what precision the loop trains a network, to run its other sizes in it too."""

    def __init__(self, model: nn.Module) -> None:
        self.kind: torch.dtype | None = None
        self._handle = model.register_forward_pre_hook(self._see)

    def again(self, device: str) -> AbstractContextManager[Any]:
        """Return a context with this precision."""
        return torch.autocast(device, self.kind, enabled=self.kind is not None)

    def remove(self) -> None:
        """Take the hook out of the network."""
        self._handle.remove()

    def _see(self, model: nn.Module, given: Any) -> None:
        if torch.is_grad_enabled():  # a validation may have another precision
            device = next(model.parameters()).device.type
            on = torch.is_autocast_enabled(device)
            self.kind = torch.get_autocast_dtype(device) if on else None
