"""The cases of all methods, collected from the modules below: there is no list to keep."""

import importlib
import pkgutil

from pliant.testing import Case

CASES: dict[str, Case] = {
    case.method: case
    for module in pkgutil.walk_packages(__path__, __name__ + ".")
    for case in getattr(importlib.import_module(module.name), "CASES", ())
}
