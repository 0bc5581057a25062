"""What both replays share: ``mini``, what it told, and the comparison."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any, ClassVar

from vllm_trace.events import (
    BlocksCached,
    EngineConfigured,
    Event,
    PrefixLookedUp,
    RequestArrived,
)
from vllm_trace.mini.kv_cache_manager import FullAttentionSpec, SlidingWindowSpec
from vllm_trace.mini.request import Request
from vllm_trace.mini.rules import rules_for
from vllm_trace.replay.facts import FACTS, Fact
from vllm_trace.replay.segments import Segment
from vllm_trace.replay.steady_manager import SteadyManager

FINISHED_BY_OUTPUT = ("stop", "length", "repetition")
"""Reasons that ``update_from_output`` finds; all others come from outside the step."""


class Diverged(Exception):
    """Both sides differ: what was recorded, what ``mini`` did, and the recorded event, if there is one."""

    def __init__(
        self, recorded: Fact | None, mini: Fact | None, event: Event | None = None
    ) -> None:
        super().__init__(recorded, mini)
        self.recorded, self.mini, self.event = recorded, mini, event
        self.number = 0


class Replay:
    """``mini`` beside a trace. A mode says in ``acts`` what each kind of event makes ``mini`` do."""

    needs: ClassVar[tuple[str, ...]] = ("max_model_len", "enable_prefix_caching")
    """Settings of ``engine.configured`` without which there is no ``mini`` to compare with."""

    acts: dict[type[Event], Callable[[Any], object]]

    def __init__(self, config: EngineConfigured, release: str) -> None:
        settings = config.settings
        self.settings = settings
        self.block_size = config.block_size
        self.told: list[Fact] = []
        """What ``mini`` told since the segment began."""
        self.num_compared = 0
        self.num_silent = 0
        """Calls of ``allocate_slots`` without an event of their own that ``mini`` agreed with."""
        self.place = 0
        """In its segment, of the event that is being taken."""
        self.requests: dict[int, Request] = {}
        self.num_hashes_told: dict[int, int] = {}
        """By arrivals and lookups; ``blocks.cached`` may have told some of them before."""
        self.rules = rules_for(release)
        self.manager = SteadyManager(
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
        events, kinds, told = segment.events, segment.kinds, self.told
        try:
            self.begin(segment)
            for place, act in enumerate(map(self.acts.get, kinds)):
                if act is not None:
                    self.place = place
                    act(events[place])
        except Exception as error:
            # What mini told before may differ already, and be the reason.
            self._compare(segment, ended=False)
            if isinstance(error, Diverged):
                error.number = segment.numbers[self._place_of(error.event, events)]
            raise
        facts = zip(map(FACTS.get, kinds), events)
        expected = [fact(event) for fact, event in facts if fact is not None]
        if told != expected:
            self._compare(segment, ended=True)
        self.num_compared += len(expected)
        told.clear()

    def begin(self, segment: Segment) -> None:
        """Called before a segment's first event."""

    def _compare(self, segment: Segment, ended: bool) -> None:
        """Fact by fact. Raises: ``Diverged`` for the first that differs; when all has ``ended``, for one too few."""
        numbers = [n for n, e in zip(segment.numbers, segment.events) if type(e) in FACTS]
        expected = [FACTS[type(e)](e) for e in segment.events if type(e) in FACTS]
        for place, (recorded, mini) in enumerate(zip_longest(expected, self.told)):
            if mini is None and not ended:
                return
            if recorded != mini:
                difference = Diverged(recorded, mini)
                number = numbers[place] if place < len(numbers) else segment.numbers[-1]
                difference.number = number
                raise difference

    def _place_of(self, event: Event | None, events: list[Event]) -> int:
        return next((i for i, one in enumerate(events) if one is event), self.place)

    def require(
        self, event: Event, names: tuple[str, ...], recorded: tuple[Any, ...], mini: tuple[Any, ...]
    ) -> None:
        """Values of an event, called ``names``, that both sides must agree on."""
        if recorded != mini:
            for name, left, right in zip(names, recorded, mini):
                if left != right:
                    raise Diverged((name, left), (name, right), event)
        self.num_compared += len(names)

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

    # Hashes of generated blocks come from the trace: it has no token ids to make them of.

    def learn_looked_up(self, event: PrefixLookedUp) -> None:
        first = self.num_hashes_told[event.request]
        self.num_hashes_told[event.request] = first + len(event.new_hashes)
        self._learn(event.request, first, event.new_hashes)

    def learn_cached(self, event: BlocksCached) -> None:
        self._learn(event.request, event.first, event.hashes)

    def _learn(self, key: int, first: int, hashes: list[int]) -> None:
        """The hashes of a request from the ``first`` on, of which some may be known."""
        request = self.requests.get(key)
        if request is not None:
            known = request.block_hashes
            num_new = first + len(hashes) - len(known)
            if num_new > 0:
                known += hashes[-num_new:]
