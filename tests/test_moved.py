"""Old module names go on working and say where things are now."""

import importlib
import sys

import pytest

from pliant.registry.moved import MOVED


@pytest.mark.parametrize("old", [name for name in MOVED if name != "pliant.ops"])
def test_an_old_name_gives_what_the_new_one_holds(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {MOVED[old]}"):
        found = importlib.import_module(old)
    new = importlib.import_module(MOVED[old])
    public = [name for name in vars(new) if not name.startswith("__")]
    assert public and all(getattr(found, name) is getattr(new, name) for name in public)


def test_a_name_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("pliant.ops.nothing")
