"""Judging a trace: every event once, every rule that wants it, the first violation of each.

A second reading, only when something was found, collects the story that led there: so a long
trace that is clean costs no memory for it.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_trace.errors import TraceError
from vllm_trace.events import (
    KINDS,
    BlockEvicted,
    BlocksTaken,
    BlocksTouched,
    EngineConfigured,
    Event,
    PrefixLookedUp,
    RequestPreempted,
    SlotsAllocated,
    SlotsRefused,
)
from vllm_trace.invariants.books import FIRST, HANDLERS, Books
from vllm_trace.invariants.judgements import Judgement, Report, Unreadable, where
from vllm_trace.invariants.registry import Invariant, Violation, choose
from vllm_trace.invariants.sources import Source, batches, is_one_process
from vllm_trace.invariants.story import concerns, describe
from vllm_trace.invariants.words import many
from vllm_trace.trace import Record, read_trace

STORY = 10
"""Events that are told before a violation."""

NAMES_KEPT = 4096
"""Requests that are over and may still be named in a message."""

_IN_SCHEDULE = (
    PrefixLookedUp, BlocksTaken, BlocksTouched, BlockEvicted, SlotsAllocated, SlotsRefused,
    RequestPreempted,
)  # fmt: skip


def check_all(paths: Iterable[Path], only: Iterable[str] = ()) -> list[Report | Unreadable]:
    """Judge several traces; one that cannot be read does not hide the others.

    Raises: ``UsageError`` for an id that does not exist.
    """
    choose(only)
    made: list[Report | Unreadable] = []
    for path in paths:
        try:
            made.append(check(read_trace(path), only, label=str(path)))
        except TraceError as error:
            made.append(Unreadable(str(path), error))
    return made


def check(
    trace: Source,
    only: Iterable[str] = (),
    also: Iterable[Invariant] = (),
    label: str = "",
) -> Report:
    """Judge a trace by the invariants of those ids (default: all) and by some more.

    Raises: ``UsageError`` for an id that does not exist, ``TraceError`` when the trace cannot be
    read or contradicts itself.
    """
    chosen = choose(only)
    chosen += [one for one in also if one.id not in {each.id for each in chosen}]
    return _Judge(trace, chosen).run(label)


class _Engine:
    """One scheduler process: its books, and one instance of each rule."""

    def __init__(self, judge: _Judge) -> None:
        self.judge = judge
        # A second reading finds all names again; of several processes, reading itself needs them.
        kept = NAMES_KEPT if is_one_process(judge.trace) else 1 << 62
        self.books = Books(judge.trace.names, kept)
        self.plan: dict[type[Event], list[tuple[Any, Judgement | None]]] = {}
        self.rules: list[tuple[Judgement, Any]] = []
        self.configured = False

    def begin(self, event: EngineConfigured) -> None:
        self.configured = True
        self.books.begin(event, self.judge.release)
        self.rules = [
            (each, each.invariant.make())
            for each in self.judge.open
            if self.judge.applies(each, self.books)
        ]
        self.compile()

    def compile(self) -> None:
        """For each kind of event: the rules before, the books, the rules after."""
        self.plan = {kind: [(handler, None)] for kind, handler in HANDLERS.items()}
        for kind, handler in FIRST.items():
            self.plan[kind].insert(0, (handler, None))
        open_ = {id(each) for each in self.judge.open}
        for judgement, rule in self.rules:
            if id(judgement) not in open_:
                continue
            for wanted, before, method in judgement.invariant.handlers:
                if wanted == "end":
                    continue
                calls = self.plan.setdefault(KINDS[wanted], [])
                call = (getattr(rule, method) if method else rule, judgement)
                # Before the books: in the order of the rules, so each goes where the books are.
                places = [i for i, (_, owner) in enumerate(calls) if owner is None]
                place = places[-1] if places else len(calls)
                calls.insert(place if before else len(calls), call)


class _Judge:
    """One reading of a trace."""

    def __init__(self, trace: Source, invariants: list[Invariant]) -> None:
        self.trace = trace
        self.judgements = [Judgement(one) for one in invariants]
        self.release = str(trace.header.get("vllm") or "")
        self.light = trace.level == "light"
        self._set_aside()
        self.open = [each for each in self.judgements if each.status == "holds"]
        self.engines: dict[int, _Engine] = {}
        self.number = 0
        self.applied: set[str] = set()
        """Rules that were judged on at least one engine."""
        self.reasons: dict[str, str] = {}
        """Why others were not."""

    def _set_aside(self) -> None:
        for each in self.judgements:
            rule = each.invariant
            if self.light and "full" in rule.needs:
                self._unjudged(each, "the trace was recorded at level light", whole=False)
                continue
            if not rule.releases:
                continue
            try:
                if not rule.holds_for(self.release):
                    reason = f"it is for vLLM {rule.releases}; this is {self.release}"
                    self._unjudged(each, reason, whole=False)
            except ValueError:
                reason = f"it is for vLLM {rule.releases}; the trace does not say its release"
                self._unjudged(each, reason, whole=False)

    def _unjudged(self, each: Judgement, reason: str, *, whole: bool) -> None:
        each.status, each.reason, each.whole = "unjudged", reason, whole

    def applies(self, each: Judgement, books: Books) -> bool:
        """Whether a rule can be judged on the engine that was just configured."""
        needs, why = each.invariant.needs, ""
        if "known-groups" in needs and books.unknown_kinds:
            why = f"groups of kind {', '.join(books.unknown_kinds)} follow other rules"
        elif "kv-events" in needs and not books.settings.get("kv_events"):
            why = "vLLM's own KV events are off"
        elif "caching" in needs and not books.caching:
            why = "prefix caching is off"
        if why:
            self.reasons.setdefault(each.invariant.id, why)
        else:
            self.applied.add(each.invariant.id)
        return not why

    # Reading --------------------------------------------------------------------------

    def run(self, label: str) -> Report:
        number, engines = 0, self.engines
        for process, batch in batches(self.trace):
            engine = engines.get(process) or self._engine_of(process)
            for event in batch:
                number += 1
                kind = type(event)
                if kind is EngineConfigured:
                    self._configured(number, process, event)
                    engine = engines[process]
                if engine is None:
                    continue
                calls = engine.plan.get(kind)
                if calls is None:
                    continue
                books = engine.books
                books.number, books.process = number, process
                owner = None
                try:
                    for call, owner in calls:
                        found = call(books, event)
                        if found:
                            self._found(engine, owner, found, event)
                except Exception as error:
                    self._go_on(engine, calls, owner, error, event)
        self.number = number
        problems = list(self.trace.problems)
        self._end(problems)
        self._sort_out(problems)
        self._tell_stories()
        release = self.release or next(
            (str(e.books.settings.get("vllm_version", "")) for e in self.engines.values()), ""
        )
        return Report(label, self.judgements, problems, self.number, release, self.trace.names)

    def _configured(self, number: int, process: int, event: Any) -> None:
        engine = self.engines.get(process)
        if engine is None or not engine.configured:
            engine = self.engines[process] = _Engine(self)
        engine.books.number = self.number = number
        engine.begin(event)

    def _engines(self) -> list[_Engine]:
        """Each once: workers stand for the engine that they work for."""
        return [*{id(engine): engine for engine in self.engines.values()}.values()]

    def _engine_of(self, process: int) -> _Engine | None:
        """Of a process without a scheduler: the engine that it works for, if that is known by now."""
        headers = [file.header for file in getattr(self.trace, "files", ())]
        own = headers[process] if headers else {}
        if own.get("role") == "engine" and len(headers) > 1:
            return None  # its own is still to come
        places = [(header.get("host"), header.get("pid")) for header in headers]
        parent = (own.get("host"), own.get("parent"))
        if parent in places:
            home = self.engines.get(places.index(parent))
        else:
            configured = [engine for engine in self._engines() if engine.configured]
            home = configured[0] if len(configured) == 1 else None
        if home is not None:
            self.engines[process] = home
        return home

    def _go_on(
        self,
        engine: _Engine,
        calls: list[Any],
        owner: Judgement | None,
        error: Exception,
        event: Event,
    ) -> None:
        """A rule raised: note it, and let those behind it see the event too."""
        while True:
            self._raised(engine, owner, error, event)
            place = next(i for i, (_, each) in enumerate(calls) if each is owner)
            calls = calls[place + 1 :]
            try:
                for call, owner in calls:
                    found = call(engine.books, event)
                    if found:
                        self._found(engine, owner, found, event)
                return
            except Exception as another:
                error = another

    def _found(self, engine: _Engine, owner: Any, found: Any, event: Event) -> None:
        for one in _each(found):
            owner.violation = self._placed(engine.books, owner.invariant, one, event)
            owner.status = "violated"
            self._close(owner)
            break  # the first one only
        if inspect.isgenerator(found):
            found.close()

    def _placed(self, books: Books, rule: Invariant, one: Any, event: Event | None) -> Violation:
        if not isinstance(one, Violation):
            request = getattr(event, "request", None)
            block = getattr(event, "block", None)
            one = books.violation(str(one), request=request, block=block)
        step = one.step
        if step is None:
            step = getattr(event, "step", None)
        if step is None:
            step = (books.step + 1 if isinstance(event, _IN_SCHEDULE) else books.now) or None
        return replace(one, invariant=rule.id, step=step)

    def _raised(
        self, engine: _Engine, owner: Judgement | None, error: Exception, event: Event
    ) -> None:
        number = engine.books.number
        if owner is None:
            raise TraceError(
                f"event {number} ({event.kind}) does not fit the events before it: "
                f"{type(error).__name__}: {error}",
                hint="The trace was edited or damaged, or this vLLM does what no known release does",
            ) from error
        owner.status, owner.whole = "raised", False
        owner.reason = f"the rule itself failed at event {number} ({event.kind}): {type(error).__name__}: {error}"
        self._close(owner)

    def _close(self, judgement: Judgement) -> None:
        self.open = [each for each in self.open if each is not judgement]
        for engine in self._engines():
            engine.compile()

    # The end --------------------------------------------------------------------------

    def _end(self, problems: list[str]) -> None:
        """Rules that look at the end; not of a trace whose end is missing."""
        if problems:
            return
        for engine in self._engines():
            engine.books.number = self.number
            for judgement, rule in engine.rules:
                if judgement.status == "holds" and hasattr(rule, "end"):
                    try:
                        found = rule.end(engine.books)
                        if found:
                            self._found(engine, judgement, found, None)  # type: ignore[arg-type]
                    except Exception as error:
                        judgement.status, judgement.whole = "raised", False
                        judgement.reason = (
                            f"the rule itself failed at the end: {type(error).__name__}: {error}"
                        )

    def _sort_out(self, problems: list[str]) -> None:
        """What seems to hold, but could not be seen."""
        engines = [engine for engine in self._engines() if engine.configured]
        lost = [problem for problem in problems if "were dropped" in problem]
        for each in self.judgements:
            if each.status == "violated" and lost and each.violation is not None:
                # Books with a hole in them prove nothing.
                each.status, each.whole = "unjudged", False
                each.reason = (
                    f"{lost[0]}; {where(each.violation)} looks wrong: {each.violation.message}"
                )
            if each.status != "holds":
                continue
            if not engines:
                self._unjudged(
                    each,
                    "the trace has no engine.configured: it began after the engine",
                    whole=False,
                )
            elif problems:
                self._unjudged(
                    each, f"no violation in what there is, but {problems[0]}", whole=False
                )
            elif each.invariant.id not in self.applied:
                self._unjudged(each, self.reasons[each.invariant.id], whole=True)
            else:
                self._look_for_evidence(each, [e.books for e in engines])

    def _look_for_evidence(self, each: Judgement, engines: list[Books]) -> None:
        needs = each.invariant.needs
        if "worker" not in needs and "attention" not in needs:
            return
        for books in engines:
            if books.saw_tokens and len(books.workers) < books.num_workers:
                reason = f"{len(books.workers)} of {many(books.num_workers, 'worker')} told of their steps"
                self._unjudged(each, reason, whole=False)
            elif "worker" in needs and books.workers - books.mappers:
                reason = "this runner's tables and slots stay on the device and are not recorded"
                self._unjudged(each, reason, whole=True)
            elif "attention" in needs and books.workers and not books.saw_attention:
                self._unjudged(each, "no kernel told the numbers it was chosen by", whole=True)

    # Stories --------------------------------------------------------------------------

    def _tell_stories(self) -> None:
        found = [each for each in self.judgements if each.violation is not None]
        if not found:
            return
        last = max(each.violation.event_number for each in found if each.violation)
        told: list[deque[Record]] = [deque(maxlen=STORY) for _ in found]
        before: deque[Record] = deque(maxlen=STORY // 2)
        for record in self.trace.records():
            for each, story in zip(found, told):
                violation = each.violation
                assert violation is not None
                if record.number > violation.event_number:
                    continue
                if record.number == violation.event_number:
                    if len(story) < 2:  # a block that nobody spoke of: what else went on
                        story.extend(one for one in before if one not in story)
                    story.append(record)
                elif concerns(record.event, violation):
                    story.append(record)
            if record.number >= last:
                break
            if not hasattr(record.event, "step"):
                before.append(record)
        for each, story in zip(found, told):
            each.story = [
                f"event {record.number}  {describe(record.event, self.trace.names)}"
                for record in sorted(story, key=lambda record: record.number)
            ]


def _each(found: Any) -> Iterator[Any]:
    if isinstance(found, (str, Violation)):
        yield found
    elif found is not True:
        yield from found
    else:
        yield "it returned True instead of saying what is wrong"
