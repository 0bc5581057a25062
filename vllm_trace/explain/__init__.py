"""``explain``: the life of one request in words, line by line with event numbers.

After ``run evict``, ``vllm-trace explain reports/evict/latest A-again`` says::

    A-again
      170 prompt tokens, up to 4 to generate
      vLLM 0.32.0: 11 blocks of 32 tokens (and the null block), prefix cache on
      a step takes up to 256 requests and 4096 tokens

     event
        80  arrived, nobody waits before it
        81  prefix cache: 3 of 5 blocks hit: 1–3 (96 of 170 tokens); block 3 (tokens
            96–127), cached by A in block 4 (event 7), was evicted at event 44 when
            B took that block
        87  took over 1–3 from the prefix cache and got 4 5 11 (logical 3–5); 5 left
            free
        88  step 9: computed the rest of the prompt, tokens 96–169
        96  steps 10–12: decoded 3 tokens
       118  finished (length) with 4 tokens generated; its table was 1–5 11; gave
            back 11 5 4 3 2 1 (event 116)
            nobody got 1–5 11 in the rest of the trace

And after ``run preempt``, of the request that had to give way::

        67  preempted: it needed 1 block (refused at event 64, 0 free) and was
            itself the one to give way; 64 computed tokens given up; gave back 6 5
            (event 65)
        77  prefix cache: 2 of 2 blocks hit: 5 6 (64 of 65 tokens)
        78  steps 7–37: waited; the pool refused it 31 times (up to event 350): 3
            blocks wanted, 2 of them its hits, which lie in the free queue; 2 free
       360  next owner: r-0 took 6, evicting what it had cached there
       363  next owner: r-1 took 5, evicting what it had cached there
       364  prefix cache: 0 of 2 blocks hit; block 0 (tokens 0–31), cached by r-2 in
            block 5 (event 17), was evicted at event 361 when r-1 took that block

``life`` follows the request, ``cache`` the hashes it asks for, ``queue``
says why a step went without it, ``say`` finds the words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_trace.events import EngineConfigured, PrefixLookedUp, RequestArrived, StepScheduled
from vllm_trace.explain.life import Life, Line
from vllm_trace.explain.words import WIDTH, listed, many, wrapped
from vllm_trace.naming import is_called, requests_called
from vllm_trace.trace import Record, Trace


@dataclass
class Story:
    """What happened to one request."""

    request: str
    number: int
    about: list[str]
    lines: list[Line]
    unknown: list[str]
    """What this trace cannot tell, in sentences."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form; ``schema`` counts changes of its shape."""
        return {"schema": 1} | asdict(self)


@dataclass
class Seen:
    """What the first pass gathers about one request."""

    number: int
    process: int
    hashes: set[int] = field(default_factory=set)
    token_ids: list[int] | None = None


@dataclass
class _Survey:
    """Names, and what concerns the requests that may be meant."""

    names: dict[int, str] = field(default_factory=dict)
    seen: dict[int, Seen] = field(default_factory=dict)
    schedulers: list[int] = field(default_factory=list)
    configured: bool = False


def explain(trace: Trace, name: str) -> Story:
    """Tell the life of the request of that name, as ``naming.requests_called`` finds it.

    Reads the trace twice: the hashes that the request asks for are known only after its life,
    and their history begins before it.

    Raises: ``UsageError`` when there is no such request, or several may be meant.
    """
    survey = _survey(trace, name)
    chosen, others = _choose(survey, name)
    seen = survey.seen[chosen]
    home = seen.process
    if home < 0:
        home = survey.schedulers[0] if survey.schedulers else 0
    light = trace.level == "light"
    life = Life(chosen, survey.names, seen, light)
    for record in _records(trace):
        if record.process == home:
            life.take(record)
    lines = life.done()
    unknown = _unknown(trace, survey, life, others)
    return Story(survey.names[chosen], chosen, _about(trace, life), lines, unknown)


def _records(trace: Trace) -> Iterator[Record]:
    """A reading that numbers requests from 0, however often the trace was read before."""
    return Trace(trace.files).records()


def _survey(trace: Trace, name: str) -> _Survey:
    """First pass: which requests there are, and the hashes of the one that may be meant."""
    fresh = Trace(trace.files)
    made = _Survey(names=fresh.names)
    part = None
    for record in fresh.records():
        event: Any = record.event
        kind = type(event)
        if kind is RequestArrived:
            exact = is_called(event.request, event.request_id, name)
            if exact or (part is None and name in event.request_id):
                part = part if exact else event.request
                hashes = set(event.block_hashes)
                made.seen[event.request] = Seen(
                    event.request, record.process, hashes, event.token_ids
                )
        elif kind is PrefixLookedUp and event.new_hashes and event.request in made.seen:
            made.seen[event.request].hashes.update(event.new_hashes)
        elif kind is StepScheduled and record.process not in made.schedulers:
            made.schedulers.append(record.process)
        elif kind is EngineConfigured:
            made.configured = True
    return made


def _choose(survey: _Survey, name: str) -> tuple[int, list[int]]:
    """(number, other requests of the same name)."""
    found = requests_called(survey.names, name)
    survey.seen.setdefault(found[0], Seen(found[0], -1))
    return found[0], found[1:]


def _about(trace: Trace, life: Life) -> list[str]:
    header, config, arrival = trace.header, life.state.config, life.arrival
    said = []
    if arrival is not None:
        said.append(
            f"{many(arrival.num_prompt_tokens, 'prompt token')}, up to {arrival.max_tokens} to generate"
        )
    if config is not None:
        settings = config.settings
        cache = "on" if settings.get("enable_prefix_caching") else "off"
        said.append(
            f"vLLM {header.get('vllm', '?')}: {config.num_blocks - 1} blocks of "
            f"{config.block_size} tokens (and the null block), prefix cache {cache}"
        )
        said.append(
            f"a step takes up to {settings.get('max_num_seqs')} requests and "
            f"{settings.get('max_num_scheduled_tokens')} tokens"
        )
    return said


def _unknown(trace: Trace, survey: _Survey, life: Life, others: list[int]) -> list[str]:
    said = list(trace.problems)
    if trace.level == "light":
        said.append(
            "level light: prefix lookups, refusals and blocks are not recorded; "
            "why it waited, what it hit and held, and for whom it was preempted cannot be told"
        )
    if not survey.configured:
        said.append(
            "the trace begins after the engine did: what was cached, held and waiting before "
            "is not known, so a cause can be older than it looks"
        )
    if life.arrival is None:
        said.append("the trace does not hold the arrival of this request")
    elif life.status in ("waiting", "running"):
        said.append("the trace does not hold the end of this request")
    if any(file.dropped for file in trace.files):
        said.append("where events were dropped is not known: numbers of blocks can be wrong after")
    own = life.arrival
    if own is not None and (own.lora or own.salted) and own.token_ids is None:
        said.append(
            "token ids were not recorded (--tokens): whether another LoRA or salt has the same "
            "tokens cannot be told"
        )
    if others:
        more = listed([f"#{number}" for number in others], 5)
        said.append(f"others have the same name; ask for them as {more}")
    return said


def render(story: Story, width: int = WIDTH) -> str:
    """The story as text."""
    out = [story.request, *(f"  {line}" for line in story.about), "", " event"]
    for line in story.lines:
        out += wrapped(line.event or "", line.text, width=width)
    if not story.lines:
        out += wrapped("", "nothing is recorded of it", width=width)
    if story.unknown:
        out += ["", "What this trace cannot tell"]
        for sentence in story.unknown:
            out += wrapped("-", sentence, margin=4, width=width)
    return "\n".join(out)
