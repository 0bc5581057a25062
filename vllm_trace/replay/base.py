"""What both replays share: ``mini``, what it told, and the comparison."""

from __future__ import annotations

from typing import Any

from vllm_trace.events import BlocksCached, EngineConfigured, Event, PrefixLookedUp, RequestArrived
from vllm_trace.mini.kv_cache_manager import FullAttentionSpec, KVCacheManager, SlidingWindowSpec
from vllm_trace.mini.request import Request
from vllm_trace.mini.rules import rules_for
from vllm_trace.replay.facts import DECISIONS, Fact, filled
from vllm_trace.replay.worker import Diverged, WorkerTables
from vllm_trace.trace import Record, Trace

FINISHED_BY_OUTPUT = ("stop", "length", "repetition")
"""Reasons that ``update_from_output`` finds; all others come from outside the step."""


class Replay:
    """What both modes share: ``mini``, what it told, and the comparison."""

    def __init__(self, config: EngineConfigured, trace: Trace) -> None:
        settings = config.settings
        self.settings = settings
        self.block_size = config.block_size
        self.told: list[Fact] = []
        self.expected: list[tuple[int, Fact]] = []
        self.num_compared = 0
        self.requests: dict[int, Request] = {}
        self.num_hashes_told: dict[int, int] = {}
        """By arrivals and lookups; ``blocks.cached`` may have told some of them before."""
        self.history: list[Record] = []
        """The last segments, for the story of a divergence."""
        self.rules = rules_for(str(trace.header["vllm"]))
        self.manager = KVCacheManager(
            config.num_blocks,
            [
                SlidingWindowSpec(group.block_size, group.sliding_window)
                if group.kind == "SlidingWindowSpec"
                else FullAttentionSpec(group.block_size)
                for group in config.groups
            ],
            settings["max_model_len"],
            enable_caching=settings["enable_prefix_caching"],
            max_in_flight_tokens=settings.get("max_in_flight_tokens"),
            retention_interval=settings.get("retention_interval"),
            rules=self.rules,
            tell=self.hear,
        )
        self.manager.watermark_blocks = settings.get("watermark_blocks", 0)
        self.blocks = self.manager.block_pool.blocks
        self.worker = WorkerTables(len(config.groups))

    def hear(self, kind: str, *fields: Any) -> None:
        """``mini``'s callback; drops what the trace does not have and adds what it has more."""
        if kind == "slots.allocated":
            request, num_new, num_hit, new, free = fields
            new = [list(ids) for ids in new]
            if num_hit or any(new):
                self.told.append((kind, request, num_new, num_hit, filled(new), free))
                self.worker.grow(request, new)
        elif kind == "blocks.cached":
            request, group, _, ids, hashes = fields
            pairs = [(i, h) for i, h in zip(ids, hashes, strict=True) if h is not None]
            if pairs:
                self.told.append(
                    (kind, request, group, [p[0] for p in pairs], [p[1] for p in pairs])
                )
        elif kind == "blocks.touched":
            counts = [self.blocks[block].ref_cnt for block in fields[0]]
            self.told.append((kind, list(fields[0]), counts))
        elif kind == "block.evicted":
            self.told.append((kind, fields[0], [fields[1]]))
        elif kind == "prefix.looked_up":
            request, num_tokens, num_hit, ids = fields
            self.told.append((kind, request, num_tokens, num_hit, filled([list(i) for i in ids])))
        elif kind == "slots.refused" or kind not in ("step.scheduled", "request.finished"):
            self.told.append((kind, *fields))

    def settle(self, number: int) -> None:
        """Both sides have said all of a call: they must be equal."""
        told, expected = self.told, self.expected
        for (at, recorded), mini in zip(expected, told, strict=False):
            if recorded != mini:
                raise Diverged(at, recorded, mini)
        if len(expected) > len(told):
            raise Diverged(*expected[len(told)], None)
        if len(told) > len(expected):
            raise Diverged(number, None, told[len(expected)])
        self.num_compared += len(told)
        told.clear()
        expected.clear()

    def require(self, number: int, name: str, recorded: Any, mini: Any) -> None:
        """A value of a step that both sides must agree on."""
        if recorded != mini:
            raise Diverged(number, (name, recorded), (name, mini))
        self.num_compared += 1

    def arrive(self, event: RequestArrived) -> Request:
        request = Request(
            event.request,
            num_prompt_tokens=event.num_prompt_tokens,
            max_tokens=event.max_tokens,
            block_hashes=event.block_hashes,
            arrival_time=event.arrival_unix,
            priority=event.priority,
        )
        self.requests[event.request] = request
        self.num_hashes_told[event.request] = len(event.block_hashes)
        return request

    def learn_hashes(self, event: Event) -> None:
        """Hashes of generated blocks come from the trace: it has no token ids to make them of."""
        if type(event) is PrefixLookedUp:
            first, hashes = self.num_hashes_told.get(event.request, 0), event.new_hashes
            self.num_hashes_told[event.request] = first + len(hashes)
        elif type(event) is BlocksCached:
            first, hashes = event.first, event.hashes
        else:
            return
        if hashes and event.request in self.requests:
            known = self.requests[event.request].block_hashes
            known += hashes[max(0, len(known) - first) :]

    def take(self, segment: list[Record]) -> None:
        """Replay one segment, or an event that decides nothing. Raises: ``Diverged``."""
        self.history = [*self.history[-40:], *segment]
        if type(segment[0].event) in DECISIONS:
            self.replay_segment(segment)
        else:
            self.observe(segment[0])

    def replay_segment(self, segment: list[Record]) -> None:
        raise NotImplementedError

    def observe(self, record: Record) -> None:
        """An event that is no decision of the scheduler: workers' tables and slots are compared."""
        self.worker.observe(record)
