"""Tells when a module has been imported, so that nothing is imported only to be hooked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class Arrivals(MetaPathFinder):
    """Calls ``arrived(name)`` when a module has run for the first time, before who imports it goes on.

    It finds nothing itself: it asks the other finders of ``sys.meta_path``, and stands in for the loader that
    they name until the module is about to run.
    """

    def __init__(self, names: Iterable[str], arrived: Callable[[str], None]) -> None:
        self._names = set(names)
        self._arrived = arrived
        if self._names:
            sys.meta_path.insert(0, self)

    def stop(self) -> None:
        """Tell nothing more. Safe to call twice."""
        self._names.clear()
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the others find, with our loader in front of theirs; None for a module that nobody waits for."""
        if fullname not in self._names:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)):
                if spec.loader is not None:
                    spec.loader = _Told(spec.loader, self)
                return spec
        return None

    def has_run(self, name: str) -> None:
        """A module is there. Once for each: another finder like this one may have asked us again."""
        if name in self._names:
            self._names.discard(name)
            self._arrived(name)


class _Told(Loader):
    def __init__(self, loader: Loader, arrivals: Arrivals) -> None:
        self._loader = loader
        self._arrivals = arrivals

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        # Who looks at the module sees its own loader: ``inspect`` and ``linecache`` ask it for the source.
        spec.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._arrivals.has_run(spec.name)


def is_imported(name: str) -> bool:
    """Whether a module is there and has run to its end."""
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)
