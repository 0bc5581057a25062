"""What both replays share: ``mini``, what it told, and the comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_trace.events import (
    BlocksCached,
    EngineConfigured,
    Event,
    PrefixLookedUp,
    RequestArrived,
)
from vllm_trace.mini.kv_cache_manager import FullAttentionSpec, KVCacheManager, SlidingWindowSpec
from vllm_trace.mini.request import Request
from vllm_trace.mini.rules import rules_for
from vllm_trace.replay.facts import FACTS, Fact
from vllm_trace.replay.segments import Segment
from vllm_trace.trace import Trace

FINISHED_BY_OUTPUT = ("stop", "length", "repetition")
"""Reasons that ``update_from_output`` finds; all others come from outside the step."""


class Diverged(Exception):
    """Both sides differ: what was recorded, what ``mini`` did, and where.

    ``event`` is the recorded event, or None: then it is the ``place``-th fact since the last
    agreement, and ``number`` is found from that.
    """

    def __init__(
        self, recorded: Fact | None, mini: Fact | None, event: Event | None = None, place: int = 0
    ) -> None:
        super().__init__(recorded, mini)
        self.recorded, self.mini, self.event, self.place = recorded, mini, event, place
        self.number = 0


class Replay:
    """``mini`` beside a trace. A mode says in ``acts`` what each kind of event makes ``mini`` do."""

    acts: dict[type[Event], Callable[[Any], object]]

    def __init__(self, config: EngineConfigured, trace: Trace) -> None:
        settings = config.settings
        self.settings = settings
        self.block_size = config.block_size
        self.told: list[Fact] = []
        self.expected: list[Fact] = []
        self.num_compared = 0
        self.num_settled = 0
        """Facts of this segment that were found equal."""
        self.num_silent = 0
        """Calls of ``allocate_slots`` without an event of their own that ``mini`` agreed with."""
        self.requests: dict[int, Request] = {}
        self.num_hashes_told: dict[int, int] = {}
        """By arrivals and lookups; ``blocks.cached`` may have told some of them before."""
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
            tell=self.told.append,
        )
        self.manager.watermark_blocks = settings.get("watermark_blocks", 0)
        self.pool = self.manager.block_pool

    def take(self, segment: Segment) -> None:
        """Replay one segment. Raises: ``Diverged``, with the number of the event."""
        self.num_settled = 0
        try:
            self.begin(segment)
            acts, facts, expect = self.acts, FACTS, self.expected.append
            for event in segment.events:
                kind = type(event)
                make = facts.get(kind)
                if make is not None:
                    expect(make(event))
                act = acts.get(kind)
                if act is not None:
                    act(event)
            self.settle()
        except Diverged as difference:
            difference.number = self._number_of(difference, segment)
            raise

    def begin(self, segment: Segment) -> None:
        """Called before a segment's first event."""

    def settle(self) -> None:
        """Both sides have said all of a call: they must be equal."""
        told, expected = self.told, self.expected
        if told != expected:
            self._differ()
        self.num_settled += len(told)
        self.num_compared += len(told)
        told.clear()
        expected.clear()

    def _differ(self) -> None:
        told, expected = self.told, self.expected
        for place, (recorded, mini) in enumerate(zip(expected, told)):
            if recorded != mini:
                raise Diverged(recorded, mini, place=self.num_settled + place)
        if len(expected) > len(told):
            raise Diverged(expected[len(told)], None, place=self.num_settled + len(told))
        raise Diverged(None, told[len(expected)], place=self.num_settled + len(expected))

    def _number_of(self, difference: Diverged, segment: Segment) -> int:
        events, numbers = segment.events, segment.numbers
        if difference.event is not None:
            return numbers[next(i for i, e in enumerate(events) if e is difference.event)]
        facts = [number for number, event in zip(numbers, events) if type(event) in FACTS]
        return facts[difference.place] if difference.place < len(facts) else numbers[-1]

    def require(self, event: Event, name: str, recorded: Any, mini: Any) -> None:
        """A value of an event that both sides must agree on."""
        if recorded != mini:
            raise Diverged((name, recorded), (name, mini), event)
        self.num_compared += 1

    # What is told of requests -----------------------------------------------------------

    def arrive(self, event: RequestArrived) -> Request:
        self.num_hashes_told[event.request] = len(event.block_hashes)
        request = self.requests[event.request] = Request(
            event.request,
            num_prompt_tokens=event.num_prompt_tokens,
            max_tokens=event.max_tokens,
            block_hashes=event.block_hashes,
            arrival_time=event.arrival_unix,
            priority=event.priority,
        )
        return request

    def forget(self, key: Any) -> None:
        """The request is over."""
        self.requests.pop(key, None)
        self.num_hashes_told.pop(key, None)

    def learn_hashes(self, event: PrefixLookedUp | BlocksCached) -> None:
        """Hashes of generated blocks come from the trace: it has no token ids to make them of."""
        request = self.requests.get(event.request)
        if request is None:
            return
        if isinstance(event, BlocksCached):
            first, hashes = event.first, event.hashes
        else:
            hashes = event.new_hashes
            first = self.num_hashes_told[event.request]
            self.num_hashes_told[event.request] = first + len(hashes)
        known = request.block_hashes
        if first + len(hashes) > len(known):
            known += hashes[max(0, len(known) - first) :]
