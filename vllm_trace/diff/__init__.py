"""``diff``: two traces of the same work, and the first decision in which they differ.

After ``run preempt`` twice, the second time with ``--engine-arg num_gpu_blocks_override=10``, a
pool larger by one block::

    the traces differ first at event 64 of A and 64 of B: schedule

      3 requests matched by name; 630 facts compared, times left out
      pools differ in size: blocks in use are compared, not free ones

    Configuration
      num_blocks: 9 in A, 10 in B

    First divergence (schedule, scheduler, step 6)
       A  event 64: slots.refused request=r-2 num_new_tokens=1 num_hit_tokens=0
          num_free_blocks=0
       B  event 64: blocks.taken blocks=[9]
      A just before:
          0 blocks free
          r-0: 1 2 7
          r-1: 3 4 8
          r-2: 5 6

Blocks and hashes are compared up to a one-to-one renaming first (another release hands out its
blocks in another order), then by their own names. ``facts`` says what of an event is
compared, ``align`` finds and classifies differences, ``tokens`` judges outputs.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_trace.diff.align import CLASSES, Names, Pair, differences, renamings
from vllm_trace.diff.config import (
    Setting,
    demand_comparable,
    demand_same_work,
    settings_that_differ,
)
from vllm_trace.diff.facts import END, Fact, Part, Seen, View, match_requests, parts, survey
from vllm_trace.diff.tokens import (
    Breach,
    TokenDifference,
    compare_outputs,
    not_checked,
    ownership,
)
from vllm_trace.events import Event, to_dict
from vllm_trace.state import KVState
from vllm_trace.trace import Record, Trace

STORY = 6
"""Events told before a divergence."""

HIDDEN = {
    "at_ns", "started_ns", "dur_ns", "arrival_unix", "sampling", "request_id", "token_ids",
    "num_kept", "kept",
}  # fmt: skip
"""Fields that are not told: times, what is long, and what follows from the others."""


@dataclass
class Side:
    """One trace at the point of a divergence."""

    event: int
    """Number of the event; of the next one when this side has none."""
    said: str
    """The event in words; empty when this side has none."""
    num_free_blocks: int | None = None
    tables: dict[str, list[list[int]]] = field(default_factory=dict)
    """Block tables by request name, just before."""
    before: list[str] = field(default_factory=list)
    """The last events of the lane before it, oldest first."""


@dataclass
class Divergence:
    """The first difference, with what led to it on both sides."""

    kind: str
    """One of ``align.CLASSES``."""
    lane: str
    step: int
    a: Side
    b: Side
    note: str = ""
    """Where both name the same block, or hash, and mean another one by it: what it stood for before."""


@dataclass
class Verdict:
    """Why outputs differ."""

    kind: str
    """``ownership breach`` or ``tables clean``."""
    text: str
    trace: str = ""
    """``A`` or ``B``: where the breach is."""
    event: int = 0
    not_checked: list[str] = field(default_factory=list)


@dataclass
class Diff:
    """Everything that ``diff`` found."""

    matched_by: str
    num_requests: int
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    divergence: Divergence | None = None
    """The first difference up to a renaming of blocks and hashes."""
    renamed: list[Divergence] = field(default_factory=list)
    """The first place where the same decision names another block, and another hash."""
    classes: dict[str, int] = field(default_factory=dict)
    num_compared: int = 0
    """Facts of A that were compared."""
    outputs: list[TokenDifference] = field(default_factory=list)
    num_equal_tokens: int = 0
    verdict: Verdict | None = None
    notes: list[str] = field(default_factory=list)
    """How it was compared."""
    not_judged: list[str] = field(default_factory=list)
    """What could not be compared, and why."""
    incomplete: list[str] = field(default_factory=list)
    """``A`` or ``B`` when it is truncated or dropped events: no difference is no pass then."""

    @property
    def is_same(self) -> bool:
        """No difference in anything that was compared."""
        found = self.settings or self.divergence or self.renamed or self.outputs
        return not (found or self.only_a or self.only_b)

    def to_dict(self) -> dict[str, Any]:
        """JSON form; ``schema`` counts changes of its shape."""
        return {"schema": 1, "same": self.is_same} | asdict(self)


def diff(a: Trace, b: Trace) -> Diff:
    """Compare two traces. Reads each a few times, holding one step of each.

    Raises: ``TraceError`` with the reason when they cannot be compared.
    """
    seen_a, seen_b = survey(a), survey(b)
    demand_comparable(a, b, seen_a, seen_b)
    to_a, matched_by = match_requests(seen_a, seen_b)
    demand_same_work(seen_a, seen_b, to_a, matched_by)
    made = Diff(matched_by, len(to_a))
    known_a, known_b = set(to_a.values()), set(to_a)
    made.only_a = [seen_a.names[n] for n in seen_a.arrived if n not in known_a]
    made.only_b = [seen_b.names[n] for n in seen_b.arrived if n not in known_b]
    made.settings, only = settings_that_differ(a, b, seen_a, seen_b)
    comparison = _Comparison(a, b, seen_a, seen_b, to_a, made)
    comparison.run()
    made.classes = {k: comparison.classes[k] for k in CLASSES if comparison.classes[k]}
    if made.settings:
        made.classes = {"configuration": len(made.settings)} | made.classes
    _judge_outputs(a, b, seen_a, seen_b, comparison, made)
    for which, trace in (("A", a), ("B", b)):
        made.not_judged += [f"{which}: {problem}" for problem in trace.problems]
        if any(file.truncated or file.dropped for file in trace.files):
            made.incomplete.append(which)
    made.not_judged += comparison.not_judged + only
    return made


# Decisions ------------------------------------------------------------------------------


class _Comparison:
    """Goes through both traces lane by lane."""

    def __init__(
        self, a: Trace, b: Trace, seen_a: Seen, seen_b: Seen, to_a: dict[int, int], made: Diff
    ) -> None:
        self.a, self.b, self.seen_a, self.seen_b = a, b, seen_a, seen_b
        self.made = made
        self.classes: Counter[str] = Counter()
        self.not_judged: list[str] = []
        self._to_a = to_a

    def to_a(self, request: int) -> int | str:
        """A's number of B's request; a request that A does not have keeps B's, marked."""
        return self._to_a.get(request, f"B{request}")

    def name(self, request: Any) -> str:
        """Name of a request by A's number."""
        if isinstance(request, str):
            return self.seen_b.names.get(int(request[1:]), request)
        return self.seen_a.names.get(request, f"#{request}")

    def run(self) -> None:
        view_a, view_b = self._views()
        for at, (left, right) in enumerate(zip(self.seen_a.schedulers, self.seen_b.schedulers)):
            self._lane("scheduler", at, left, right, view_a, view_b)
        self._workers(view_a, view_b)

    def _views(self) -> tuple[View, View]:
        light = "light" in (self.a.level, self.b.level)
        config_a, config_b = self.seen_a.config, self.seen_b.config
        tokens = bool(self.seen_a.num_token_steps and self.seen_b.num_token_steps)
        hashes, more_free = True, 0
        if light:
            self.made.notes.append(
                "compared at level light (arrivals, steps, preemptions, ends): "
                "lookups, evictions and frees are not in both"
            )
        if config_a and config_b:
            if config_a.hash_block_size != config_b.hash_block_size:
                hashes = False
                self.made.notes.append("hashes are left out: they stand for other block sizes")
            more_free = config_a.num_blocks - config_b.num_blocks
        if more_free:
            self.made.notes.append(
                "pools differ in size: blocks in use are compared, not free ones"
            )
        return View(light, hashes, tokens), View(light, hashes, tokens, more_free)

    def _workers(self, view_a: View, view_b: View) -> None:
        workers_a, workers_b = self.seen_a.workers, self.seen_b.workers
        missing = [n for n, workers in (("A", workers_a), ("B", workers_b)) if not workers]
        if missing:
            both = " and ".join(missing)
            self.not_judged.append(f"tables and slots of the kernels: {both} recorded none")
            return
        if len(workers_a) != len(workers_b):
            self.made.notes.append(f"A has {len(workers_a)} workers, B has {len(workers_b)}")
        for at, (left, right) in enumerate(zip(workers_a, workers_b)):
            self._lane("worker", at, left, right, view_a, view_b)

    def _lane(self, lane: str, at: int, left: int, right: int, view_a: View, view_b: View) -> None:
        names = Names()
        sides = (_Reader(self.a, self.name), _Reader(self.b, lambda r: self.name(self.to_a(r))))
        stream_a = parts(self.a, lane, left, lambda request: request, view_a)
        stream_b = parts(self.b, lane, right, self.to_a, view_b)
        label = lane if not at else f"{lane} {at}"
        first: Divergence | None = None
        renamed: dict[str, Divergence] = {}
        for part_a, part_b in joined(stream_a, stream_b):
            if self._ended(label, part_a, part_b):
                break
            found = differences(part_a, part_b, names)
            self.made.num_compared += len(part_a.facts) if part_a else 0
            if found and first is None:
                first = self._divergence(label, found[0], part_a, part_b, sides)
                first.note = names.clash(found[0])
            for pair in found:
                self.classes[pair.kind] += 1
            if first is not None:
                continue
            if part_a and part_b and len(renamed) < 2:
                for pair in renamings(part_a, part_b):
                    if pair.kind not in renamed:
                        again = (sides[0].copy(), sides[1].copy())
                        renamed[pair.kind] = self._divergence(label, pair, part_a, part_b, again)
            sides[0].take(part_a)
            sides[1].take(part_b)
        self._keep(first, renamed)

    def _ended(self, lane: str, part_a: Part | None, part_b: Part | None) -> bool:
        """Whether a truncated side has come to its end: what the other has more is no difference."""
        for which, trace, part, other in (
            ("A", self.a, part_a, part_b), ("B", self.b, part_b, part_a)
        ):  # fmt: skip
            if (part is None or part.key[0] == END) and any(f.truncated for f in trace.files):
                rest = other.records[0].number if other and other.records else 0
                more = f"; the other one was not compared from its event {rest} on" if rest else ""
                self.not_judged.append(f"{lane}: {which} is truncated{more}")
                return True
        return False

    def _keep(self, first: Divergence | None, renamed: dict[str, Divergence]) -> None:
        known = self.made.divergence
        if first and (known is None or first.a.event < known.a.event):
            self.made.divergence = first
        for kind, divergence in renamed.items():
            if all(kind != other.kind for other in self.made.renamed):
                self.made.renamed.append(divergence)
                self.classes[kind] += 1

    def _divergence(
        self, lane: str, pair: Pair, part_a: Part | None, part_b: Part | None, sides: Any
    ) -> Divergence:
        fact = pair.a or pair.b
        part = part_a or part_b
        last = part.records[-1].event if part else None
        return Divergence(
            pair.kind,
            lane,
            getattr(fact and fact.event, "step", 0) or getattr(last, "step", 0),
            sides[0].side(pair.a, part_a, pair.place_a, pair),
            sides[1].side(pair.b, part_b, pair.place_b, pair),
        )


class _Reader:
    """Keeps one side's state up to the part that is compared."""

    def __init__(self, trace: Trace, name: Any) -> None:
        self.trace, self.name = trace, name
        self.state = KVState()
        self.recent: deque[Record] = deque(maxlen=STORY)

    def copy(self) -> _Reader:
        """For a look ahead within the part."""
        made = _Reader(self.trace, self.name)
        made.state, made.recent = deepcopy(self.state), self.recent.copy()
        return made

    def take(self, part: Part | None) -> None:
        for record in part.records if part else ():
            self.state.apply(record.event)
            self.recent.append(record)

    def side(self, fact: Fact | None, part: Part | None, place: int, pair: Pair) -> Side:
        """This side as it is just before the fact, or before the place where it is missing."""
        facts = part.facts if part else []
        upto = fact.number if fact else (facts[place].number if place < len(facts) else END)
        for record in part.records if part else ():
            if record.number >= upto:
                break
            self.state.apply(record.event)
            self.recent.append(record)
        last = self.recent[-1].number + 1 if self.recent else 0
        return Side(
            upto if upto < END else last,
            describe(fact.event, self.name) if fact else "",
            self.state.num_free_blocks,
            {self.name(r): [list(row) for row in rows] for r, rows in self.state.tables.items()},
            [f"{r.number} {describe(r.event, self.name)}" for r in self.recent],
        )


def joined(a: Iterator[Part], b: Iterator[Part]) -> Iterator[tuple[Part | None, Part | None]]:
    """Parts of the same name side by side; a side that lost an end of a part catches up."""
    left, right = next(a, None), next(b, None)
    while left is not None and right is not None:
        while left.key != right.key and END not in (left.key[0], right.key[0]):
            behind, stream = (left, a) if left.key < right.key else (right, b)
            more = next(stream, None)
            if more is None:
                break
            longer = Part(more.key, behind.records + more.records, behind.facts + more.facts)
            left, right = (longer, right) if behind is left else (left, longer)
        if left.key != right.key and left.key[0] == END:
            yield None, right
            right = next(b, None)
            continue
        if left.key != right.key and right.key[0] == END:
            yield left, None
            left = next(a, None)
            continue
        yield left, right
        left, right = next(a, None), next(b, None)
    while left is not None or right is not None:
        yield left, right
        left, right = next(a, None), next(b, None)


def describe(event: Event, name: Any) -> str:
    """An event in words, without its times."""
    fields = to_dict(event)
    kind = fields.pop("kind")
    if "request" in fields:
        fields["request"] = name(fields["request"])
    for key in ("requests", "new", "resumed", "preempted", "finished"):
        if key in fields:
            fields[key] = [name(request) for request in fields[key] or ()]
    if kind == "engine.configured":
        fields = {key: fields[key] for key in ("num_blocks", "block_size")}
    shown = [f"{k}={v}" for k, v in fields.items() if k not in HIDDEN and v not in (None, [], {})]
    return " ".join([kind, *shown])


# Outputs --------------------------------------------------------------------------------


def _judge_outputs(
    a: Trace, b: Trace, seen_a: Seen, seen_b: Seen, comparison: _Comparison, made: Diff
) -> None:
    missing = [n for n, s in (("A", seen_a), ("B", seen_b)) if not s.num_token_steps]
    if missing:
        who = " and ".join(missing)
        comparison.not_judged.append(f"output tokens: {who} recorded no token ids (--tokens)")
        return
    found, made.num_equal_tokens = compare_outputs(a, b, comparison.to_a, comparison.name)
    made.outputs = found
    if not found:
        return
    first = found[0]
    breaches: list[tuple[str, Breach]] = []
    for which, trace, seen, event in (
        ("A", a, seen_a, first.event_a),
        ("B", b, seen_b, first.event_b),
    ):
        breach = next(ownership(trace, seen.names), None)
        if breach is not None and breach.event <= event:
            breaches.append((which, breach))
        elif breach is not None:
            made.notes.append(f"{which} has an ownership breach after it, at event {breach.event}")
    unseen = not_checked(a, seen_a, "A") + not_checked(b, seen_b, "B")
    unseen.append("the contents of the KV cache are not recorded")
    if breaches:
        which, breach = breaches[0]
        text = f"ownership breach at event {breach.event} of {which}: {breach.text}"
        made.verdict = Verdict("ownership breach", text, which, breach.event, unseen)
        return
    text = "tables clean: numerics of the batch"
    if first.step_a == first.step_b and first.batch_a == first.batch_b:
        text += f"; both computed it in step {first.step_a}, in the same batch"
    else:
        text += (
            f"; A computed it in step {first.step_a} with {len(first.batch_a) - 1} others, "
            f"B in step {first.step_b} with {len(first.batch_b) - 1}"
        )
    if seen_a.samples or seen_b.samples:
        text += "; tokens are drawn at random (temperature above 0), which alone can do it"
    made.verdict = Verdict("tables clean", text, not_checked=unseen)
