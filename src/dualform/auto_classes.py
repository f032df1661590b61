"""Let transformers' Auto classes find our models after `import dualform` alone, which imports neither.

The mapping in which transformers looks up kinds of models learns one more key, whose models are imported when it is
asked for. It is made when transformers makes that mapping, or here if it has.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MAPPING = "transformers.models.auto.configuration_auto"
KEY, MODELS = "dualform", "dualform.models"


def teach(module: ModuleType) -> None:
    """Give transformers' mapping of configurations our key."""
    mapping = getattr(module, "CONFIG_MAPPING", None)
    if mapping is None or getattr(type(mapping), "knows_dualform", False):
        return

    class WithOurs(type(mapping)):
        knows_dualform = True

        def __getitem__(self, key: Any) -> Any:
            if key == KEY:
                import_module(MODELS)  # which registers it
            return super().__getitem__(key)

        def __contains__(self, key: object) -> bool:
            return key == KEY or super().__contains__(key)

    WithOurs.__name__ = WithOurs.__qualname__ = type(mapping).__name__
    mapping.__class__ = WithOurs


class Teaching(Loader):
    """Load a module as another loader does, then teach it."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        teach(module)


class Waiting(MetaPathFinder):
    """Find one module as the others find it, with a loader that teaches it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != MAPPING:
            return None
        for finder in [finder for finder in sys.meta_path if finder is not self]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                spec.loader = None if spec.loader is None else Teaching(spec.loader)
                return spec
        return None


def wait_for_transformers() -> None:
    """Teach transformers' mapping now if it is there, else when it comes."""
    if MAPPING in sys.modules:
        teach(sys.modules[MAPPING])
    elif not any(type(finder).__name__ == Waiting.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, Waiting())


wait_for_transformers()
