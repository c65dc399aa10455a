"""What can go wrong, each as one sentence that says what to do next."""

import importlib
import re
import unicodedata
from collections.abc import Mapping
from types import ModuleType
from typing import Any

_LONG, _WHOLE = 400, 4000  # characters of a word, of a message
_HIDDEN = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}  # what steers a terminal or cannot be seen


class PliantError(ValueError):
    """Any refusal of Pliant; the message says what was expected, what came and what to do.

    Names in it may come from a file of anybody's: what steers a terminal is escaped, and what is
    very long is shortened.
    """

    def __str__(self) -> str:
        """Return the message, fit for a terminal."""
        return _shortened(shown(super().__str__()), _WHOLE)


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


def shown(text: str, most: int = _LONG) -> str:
    r"""Write text so that a terminal does nothing but show it, long words shortened.

    Args:
        text: of anybody.
        most: characters of a word.

    >>> print(shown("layer\x1b[2J" + 500 * "a", 12))
    layer\x…aaaa
    """
    if not text.isascii() or not text.isprintable():
        text = "".join(map(_seen, text))
    if len(text) <= most:
        return text
    return re.sub(rf"\S{{{most + 1},}}", lambda word: _shortened(word[0], most), text)


def _seen(character: str) -> str:
    if character in "\n\r\t":
        return " "
    if unicodedata.category(character) not in _HIDDEN:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()


def _shortened(text: str, most: int) -> str:
    end = most // 3
    return text if len(text) <= most else f"{text[: most - end - 1]}…{text[-end:]}"


class AccuracyWarning(UserWarning):
    """A smaller network lost more of its score than it may, or nobody is sure that it did not."""


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


def must_be(kinds: Any, what: str, value: Any, error: type[PliantError], words: str) -> None:
    """Refuse an argument of another type.

    Args:
        kinds: what it may be an instance of; a class is none.
        what: the argument, for the message.
        value: what came.
        error: to raise.
        words: what it must be, for the message.

    Raises:
        PliantError: it is something else.
    """
    if isinstance(value, type) or not isinstance(value, kinds):
        kind = value if isinstance(value, type) else type(value)
        short = value is None or isinstance(value, int | float | str | bytes)
        raise error(f"{what} must be {words}, not {repr(value) if short else kind.__name__}.")


def nothing_for(
    what: str, reasons: Mapping[str, str], none: str = "it has no layers"
) -> ModelError:
    """Return the refusal of a network in which there is nothing for a method to change.

    Args:
        what: is missing, and what the method needs: the middle of a sentence.
        reasons: why layers are left alone; the first three are named.
        none: what to say where there are none to be left.
    """
    few = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
    return ModelError(f"The model has no {what} ({few or none}).")
