"""Which KV-cache group a layer is of."""

from __future__ import annotations

import re

from vllm_trace.events import EngineConfigured

_LAYER = re.compile(r"\.(\d+)(?:\.|$)")

MAX_LISTS = 64
"""Lists of layers whose groups are remembered; a model has one or two."""


def layer_index(name: str) -> int:
    """The layer's number in the model: 3 for ``model.layers.3.self_attn.attn``; -1 if none."""
    match = _LAYER.search(name)
    return int(match[1]) if match else -1


class LayerGroups:
    """The groups of an engine's layers."""

    def __init__(self) -> None:
        self._groups: dict[int, int] = {}
        self._found: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}

    def configured(self, event: EngineConfigured) -> None:
        """A new engine in this process."""
        self._groups = {
            layer_index(name): place
            for place, group in enumerate(event.groups)
            for name in group.layers
        }
        self._found.clear()

    def of(self, layers: list[int]) -> list[tuple[int, list[int]]]:
        """(group, places in ``layers`` of its own); a layer that is not known is in group 0."""
        key = tuple(layers)
        found = self._found.get(key)
        if found is None:
            places: dict[int, list[int]] = {}
            for place, layer in enumerate(layers):
                places.setdefault(self._groups.get(layer, 0), []).append(place)
            if len(self._found) >= MAX_LISTS:
                self._found.clear()
            found = self._found[key] = [*places.items()]
        return found
