"""Why a prefix was not hit: what became of the hashes that one request asks for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_trace.events import (
    BlockEvicted,
    BlocksCached,
    EngineConfigured,
    PrefixLookedUp,
    RequestArrived,
)

CAUSES = {
    "all hit": "nothing is missing",
    "cache off": "the engine runs without a prefix cache",
    "short": "there is no full block",
    "logits": "the last token has to be computed, and with it its whole block",
    "none shared": "no request had cached these tokens",
    "evicted": "the block was handed out to somebody else",
    "reset": "the prefix cache was emptied on request",
    "salt": "the same tokens are cached under another salt",
    "lora": "the same tokens are cached for another LoRA",
    "group": "one KV-cache group has the block and another lost it",
    "unread": "it was in the cache and was not taken",
    "unknown": "the trace does not tell",
}


@dataclass
class Miss:
    """The first block that a lookup did not hit, and why."""

    cause: str
    """A key of ``CAUSES``."""
    num_hit_blocks: int
    num_full_blocks: int
    index: int = -1
    """Logical position of the block; -1 when nothing is missing."""
    first_token: int = -1
    last_token: int = -1
    block: int = -1
    """Physical block that held it last."""
    cached_by: int = -1
    cached_event: int = 0
    lost_event: int = 0
    taker: int = -1
    """Request that got the block when its contents were evicted."""
    group: int = 0
    other: int = -1
    """Request with the same tokens under another salt or LoRA."""
    under: str = ""
    """What that request asked under."""

    def to_dict(self) -> dict[str, Any]:
        """Without what does not apply; requests stay numbers."""
        return {key: value for key, value in asdict(self).items() if value not in (-1, "")}


def first_miss(event: PrefixLookedUp, config: EngineConfigured) -> Miss:
    """What a lookup tells by itself; ``cause`` is empty where only the cache's history can say it."""
    unit = config.block_size
    full, hittable = event.num_tokens // unit, (event.num_tokens - 1) // unit
    got = event.num_hit_tokens // unit
    miss = Miss("all hit", got, full)
    if not config.settings.get("enable_prefix_caching", True):
        miss.cause = "cache off"
    elif full == 0:
        miss.cause = "short"
    elif got < hittable:
        miss.cause, miss.index = "", got
    elif full > hittable:
        miss.cause, miss.index = "logits", hittable
    if miss.index >= 0:
        miss.first_token, miss.last_token = miss.index * unit, (miss.index + 1) * unit - 1
    return miss


@dataclass
class _Copies:
    """Where one hash of one group can be hit, or how it was lost."""

    blocks: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Physical block → (event, request) that cached it."""
    last: tuple[int, int, int] = (-1, 0, -1)
    """(block, event, request) of the copy that went last."""
    lost_event: int = 0
    taker: int = -1
    reset: bool = False


@dataclass
class _Twin:
    """Another request that begins with the same tokens."""

    request: int
    num_tokens: int
    lora: str | None
    salted: bool


class HashBook:
    """The history of the hashes in ``wanted``; all others are passed by.

    ``own`` is the request of which the story tells, ``wanted`` its hashes from the whole trace.
    """

    def __init__(self, own: int, wanted: Iterable[int]) -> None:
        self.own = own
        self.wanted = frozenset(wanted)
        self.config: EngineConfigured | None = None
        self.copies: dict[tuple[int, int], _Copies] = {}
        self.hashes: list[int] = []
        """The request's hashes in order, as far as they are known."""
        self.arrival: RequestArrived | None = None
        self.twins: dict[tuple[str | None, bool], _Twin] = {}
        self._waiting_for_taker: list[tuple[int, _Copies]] = []

    def configured(self, event: EngineConfigured) -> None:
        """A new pool: nothing is cached."""
        self.config = event
        self.copies.clear()

    def arrived(self, event: RequestArrived, tokens: Sequence[int] | None) -> None:
        """Note the request itself, or another one that begins with the same ``tokens``."""
        if event.request == self.own:
            self.arrival = event
            self.hashes = list(event.block_hashes)
            return
        if not tokens or not event.token_ids:
            return
        pairs = enumerate(zip(tokens, event.token_ids))
        shared = next(
            (at for at, (a, b) in pairs if a != b), min(len(tokens), len(event.token_ids))
        )
        key = (event.lora, event.salted)
        known = self.twins.get(key)
        if shared and (known is None or shared > known.num_tokens):
            self.twins[key] = _Twin(event.request, shared, event.lora, event.salted)

    def cached(self, number: int, event: BlocksCached) -> None:
        """Blocks got a hash."""
        for block, block_hash in zip(event.blocks, event.hashes):
            if block_hash in self.wanted:
                copies = self.copies.setdefault((event.group, block_hash), _Copies())
                copies.blocks[block] = (number, event.request)

    def evicted(self, number: int, event: BlockEvicted) -> None:
        """A block lost its hashes; who takes it is known at the next ``took``."""
        for block_hash in event.hashes:
            if block_hash not in self.wanted:
                continue
            for (_, known), copies in self.copies.items():
                if known == block_hash and event.block in copies.blocks:
                    copies.last = (event.block, *copies.blocks.pop(event.block))
                    copies.lost_event, copies.taker, copies.reset = number, -1, False
                    self._waiting_for_taker.append((event.block, copies))

    def took(self, request: int) -> None:
        """``allocate_slots`` returned: what was evicted since the last one was evicted for it."""
        for _, copies in self._waiting_for_taker:
            copies.taker = request
        self._waiting_for_taker.clear()

    def reset(self, number: int) -> None:
        """Everything was forgotten."""
        for copies in self.copies.values():
            for block, (event, request) in copies.blocks.items():
                copies.last = (block, event, request)
                copies.lost_event, copies.taker, copies.reset = number, -1, True
            copies.blocks.clear()

    def looked_up(self, event: PrefixLookedUp) -> Miss:
        """Judge one lookup of the request."""
        self.hashes += event.new_hashes
        config = self.config
        if config is None:
            return Miss("unknown", 0, 0)
        miss = first_miss(event, config)
        if not miss.cause:
            self._examine(miss, config, config.block_size)
        return miss

    def _examine(self, miss: Miss, config: EngineConfigured, unit: int) -> None:
        """Look for the missing block in every group."""
        sizes = [group.block_size for group in config.groups] or [unit]
        there: list[int] = []
        missing: list[tuple[int, int]] = []
        for group, size in enumerate(sizes):
            wanted = self._hashes_of(miss.index, unit, size, config.hash_block_size)
            if wanted is None:
                miss.cause = "unknown"
                return
            absent = [h for h in wanted if not self._is_cached(group, h)]
            if absent:
                missing.append((group, absent[0]))
            else:
                there.append(group)
        if not missing:
            self._unread(miss, sizes, unit, config)
            return
        group, block_hash = missing[0]
        miss.group = group
        copies = self.copies.get((group, block_hash))
        if copies is None or not copies.lost_event:
            miss.cause = "none shared"
            self._blame_a_twin(miss)
        else:
            miss.cause = "reset" if copies.reset else "evicted"
            miss.block, miss.cached_event, miss.cached_by = copies.last
            miss.lost_event, miss.taker = copies.lost_event, copies.taker
        if there:
            miss.cause = "group"

    def _is_cached(self, group: int, block_hash: int) -> bool:
        copies = self.copies.get((group, block_hash))
        return copies is not None and bool(copies.blocks)

    def _hashes_of(self, index: int, unit: int, size: int, hash_size: int) -> list[int] | None:
        """Hashes of a group's blocks within one unit; None when one is not known."""
        found = []
        for end in range(index * unit + size, (index + 1) * unit + 1, size):
            place = end // hash_size - 1
            if not 0 <= place < len(self.hashes):
                return None
            found.append(self.hashes[place])
        return found

    def _unread(self, miss: Miss, sizes: list[int], unit: int, config: EngineConfigured) -> None:
        wanted = self._hashes_of(miss.index, unit, sizes[0], config.hash_block_size) or [0]
        copies = self.copies[0, wanted[0]]
        miss.cause = "unread"
        miss.block, (miss.cached_event, miss.cached_by) = next(iter(copies.blocks.items()))

    def _blame_a_twin(self, miss: Miss) -> None:
        """Tokens that are equal up to here, under another LoRA or salt."""
        own = self.arrival
        if own is None:
            return
        for twin in sorted(self.twins.values(), key=lambda twin: -twin.num_tokens):
            if twin.num_tokens <= miss.last_token:
                continue
            if twin.lora != own.lora:
                miss.cause, miss.other = "lora", twin.request
                miss.under = f"with LoRA {twin.lora}" if twin.lora else "without a LoRA"
                return
            if twin.salted or own.salted:
                miss.cause, miss.other = "salt", twin.request
                salt = "under another salt" if own.salted else "under a salt"
                miss.under = salt if twin.salted else "without a salt"
                return
