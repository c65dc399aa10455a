"""What can go wrong, each as one sentence that says what to do next."""

import importlib
from types import ModuleType


class PliantError(ValueError):
    """Any refusal of Pliant; the message says what was expected, what came and what to do."""


class MethodError(PliantError):
    """An unknown method or option, or a method that cannot be used in this way."""


class BudgetError(PliantError):
    """A budget that is malformed, impossible or missed; the message names what is reachable."""


class ChainError(PliantError):
    """Methods that cannot be combined as asked."""


class EditError(PliantError):
    """An edit that does not fit the layer it names."""


class DataError(PliantError):
    """Data that cannot be trained on: empty, not finite, wrong shape, labels out of range."""


class ModelError(PliantError):
    """A model that cannot be handled: fails in forward, nothing to factorize, tied weights."""


class TrainingError(PliantError):
    """Training went wrong: the loss or a weight stopped being finite."""


class ArtifactError(PliantError):
    """A file that is damaged, foreign, too new, or not what it claims to be."""


class OutputError(PliantError):
    """A result that cannot be written: the folder exists, the disk is full."""


class AccuracyWarning(UserWarning):
    """A smaller network lost more of its score than it may."""


class MissingExtraError(PliantError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it.

    Raises:
        MissingExtraError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and not module.startswith(error.name.split(".")[0]):
            raise
        raise MissingExtraError(
            f'{module} is needed here and is not installed: pip install "pliant[{extra}]".'
        ) from error
