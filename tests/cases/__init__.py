"""The cases of all methods, collected from the modules of this folder: there is no list to keep."""

import importlib
import pkgutil

from pliant.testing import Case

CASES: dict[str, Case] = {
    case.method: case
    for module in pkgutil.iter_modules(__path__, __name__ + ".")
    for case in importlib.import_module(module.name).CASES
}
