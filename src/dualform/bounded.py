"""A dictionary of so many entries at most: what was longest not asked for goes first."""

from __future__ import annotations

from collections import OrderedDict
from threading import RLock
from typing import Any, TypeVar

T = TypeVar("T")


class Bounded(OrderedDict[Any, T]):
    """At most `size` entries; to read one is to ask for it. Threads may share it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self._lock = RLock()

    def __getitem__(self, key: Any) -> T:
        with self._lock:
            value = super().__getitem__(key)
            self.move_to_end(key)
            return value

    def get(self, key: Any, default: Any = None) -> Any:
        with self._lock:
            return self[key] if super().__contains__(key) else default

    def __setitem__(self, key: Any, value: T) -> None:
        with self._lock:
            super().__setitem__(key, value)
            while len(self) > self.size:
                del self[next(iter(self))]
