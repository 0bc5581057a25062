"""Who shares which prefix: the requests' block hashes as a tree.

A node is a run of blocks that the same requests have in common. The hash of a block covers all
tokens before it, so equal hashes are equal prefixes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_trace.events import (
    BlockEvicted,
    BlocksCached,
    EngineConfigured,
    Event,
    PrefixLookedUp,
    RequestArrived,
    SlotsAllocated,
)


@dataclass
class _Seen:
    """What became of one hash."""

    requests: dict[int, None] = field(default_factory=dict)
    blocks: dict[int, None] = field(default_factory=dict)
    """Physical blocks that ever held it."""
    num_hits: int = 0
    """Admissions that took it from the cache."""
    num_evictions: int = 0
    first_event: int = 0


class PrefixTree:
    """Fold of a trace into the tree."""

    def __init__(self) -> None:
        self.chains: dict[int, list[int]] = {}
        """Request → hashes of its full blocks, in order."""
        self.seen: dict[int, _Seen] = {}
        self.hits: dict[int, list[list[int]]] = {}
        """Request → ``[event, tokens, hit tokens]`` of its lookups."""
        self.block_size = 1
        """Tokens that one hash stands for."""

    def take(self, number: int, event: Event) -> None:
        if type(event) is EngineConfigured:
            self.block_size = event.hash_block_size
        elif type(event) is RequestArrived:
            self._extend(number, event.request, event.block_hashes)
        elif type(event) is PrefixLookedUp:
            self._extend(number, event.request, event.new_hashes)
            row = [number, event.num_tokens, event.num_hit_tokens]
            looked = self.hits.setdefault(event.request, [])
            # A waiting request is looked up in every step: the same answer once.
            if not looked or looked[-1][1:] != row[1:]:
                looked.append(row)
        elif type(event) is SlotsAllocated and event.num_hit_tokens:
            chain = self.chains.get(event.request, [])
            for block_hash in chain[: event.num_hit_tokens // self.block_size]:
                self.seen[block_hash].num_hits += 1
        elif type(event) is BlocksCached and event.group == 0:
            for block, block_hash in zip(event.blocks, event.hashes, strict=False):
                if block_hash in self.seen:
                    self.seen[block_hash].blocks[block] = None
        elif type(event) is BlockEvicted:
            for block_hash in event.hashes:
                if block_hash in self.seen:
                    self.seen[block_hash].num_evictions += 1

    def _extend(self, number: int, request: int, hashes: list[int]) -> None:
        chain = self.chains.setdefault(request, [])
        for block_hash in hashes:
            chain.append(block_hash)
            seen = self.seen.get(block_hash)
            if seen is None:
                seen = self.seen[block_hash] = _Seen(first_event=number)
            seen.requests[request] = None

    def to_list(self) -> list[dict[str, Any]]:
        """The nodes, parents before their children; ``parent`` is a place in this list or -1.

        What a request has to itself is no node.
        """
        made: list[dict[str, Any]] = []
        # An explicit stack: a chain of a million tokens must not end the recursion.
        whole = [request for request, chain in self.chains.items() if chain]
        stack = [(0, whole, -1)]
        while stack:
            depth, requests, parent = stack.pop()
            groups: dict[int, list[int]] = {}
            for request in requests:
                chain = self.chains[request]
                if depth < len(chain):
                    groups.setdefault(chain[depth], []).append(request)
            shared = {h: rs for h, rs in groups.items() if len(rs) > 1}
            for rs in sorted(shared.values(), key=len):  # popped in reverse: the largest first
                made.append(self._node(depth, rs, parent))
                stack.append((depth + made[-1]["num_blocks"], rs, len(made) - 1))
        return made

    def _node(self, depth: int, requests: list[int], parent: int) -> dict[str, Any]:
        """The longest run from ``depth`` on that all of these have in common."""
        chains = [self.chains[request] for request in requests]
        end = depth + 1
        shortest = min(map(len, chains))
        while end < shortest and all(chain[end] == chains[0][end] for chain in chains):
            end += 1
        run = [self.seen[block_hash] for block_hash in chains[0][depth:end]]
        return {
            "parent": parent,
            "first": depth,
            "num_blocks": end - depth,
            "num_tokens": (end - depth) * self.block_size,
            "requests": requests,
            "blocks": sorted({block for seen in run for block in seen.blocks}),
            "hits": max(seen.num_hits for seen in run),
            "evictions": sum(seen.num_evictions for seen in run),
            "event": min(seen.first_event for seen in run),
            "hash": str(chains[0][end - 1]),
        }
