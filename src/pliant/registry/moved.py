"""Imports from the places that modules had in version 0.1 go on working, with a warning."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence

MOVED = {
    "pliant.artifact": "pliant.files.artifact",
    "pliant.elastic": "pliant.edits.sizes",
    "pliant.export": "pliant.files.onnx",
    "pliant.factorize": "pliant.families.lowrank.factorize",
    "pliant.math.tsvd": "pliant.families.solve.tsvd",
    "pliant.ops": "pliant.surgery",
    "pliant.ops.edits": "pliant.edits",
    "pliant.prune": "pliant.families.prune.pruner",
    "pliant.search": "pliant.families.search.bilevel",
    "pliant.solution": "pliant.result",
}
"""Old names that documents and other packages may use, and the modules that took over."""


class Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a moved module under its old name."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Know the old names only."""
        if name not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=name == "pliant.ops")

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """Warn, and fill a module of the old name with what the new one holds."""
        new = MOVED[spec.name]
        warnings.warn(
            f"{spec.name} is now {new}: import it from there.", DeprecationWarning, stacklevel=2
        )
        module = types.ModuleType(spec.name)
        module.__dict__.update(
            {k: v for k, v in vars(importlib.import_module(new)).items() if k[:2] != "__"}
        )
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing is left to do."""


def install() -> None:
    """Let old names be found, once."""
    if not any(isinstance(finder, Moved) for finder in sys.meta_path):
        sys.meta_path.append(Moved())
