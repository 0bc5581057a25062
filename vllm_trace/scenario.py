"""Scenarios: workloads as TOML, what each shows, and the check that it did show it.

A file in ``scenarios/`` has these keys::

    title = "…"            one line
    shows = "…"            what a reader will see, in a sentence or two
    plan = 13              step of the learning plan that it serves (0: none)
    seconds = 10           how long it takes on two cores
    seed = 1               makes prompts and lengths

    [engine]               arguments of vllm.LLM; ``model`` may be a tiny checkpoint's name

    [prefixes]             named beginnings that requests share: a number of tokens, or a text
    system = 160

    [[requests]]           in the order of arrival
    name = "user"          count > 1 makes user-0, user-1, …
    count = 100
    prompt = "text"        or tokens = 60, or tokens = {median=.., sigma=.., min=.., max=..}
    prefix = "system"
    max_tokens = 20        or a table like that of tokens
    step = 3               engine step before which it is added; ``every`` spreads a count
    after = "user-0"       instead of step: added when that request has finished
    abort_after = 5        tokens after which the client goes away; -1: while it waits
    n, temperature, seed   as in vllm.SamplingParams; beam_width makes a beam search

    [expect]               facts of the summary: ``preemptions = ">= 1"``
"""

from __future__ import annotations

import operator
import random
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from math import exp
from pathlib import Path
from typing import Any

from vllm_trace.errors import UsageError, unknown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_OPERATORS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True)
class Arrival:
    """One request of a workload, ready to be added to an engine."""

    name: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    """Used when there is no text."""
    max_tokens: int = 16
    step: int = 0
    after: str = ""
    abort_after: int = 0
    n: int = 1
    temperature: float = 0.0
    seed: int | None = None
    beam_width: int = 0


@dataclass(frozen=True)
class Scenario:
    """One file of ``scenarios/``."""

    name: str
    title: str
    shows: str
    plan: int = 0
    seconds: int = 10
    seed: int = 0
    engine: Mapping[str, Any] = field(default_factory=dict)
    prefixes: Mapping[str, int | str] = field(default_factory=dict)
    requests: tuple[Mapping[str, Any], ...] = ()
    expect: Mapping[str, str | int] = field(default_factory=dict)

    def arrivals(self, vocab_size: int) -> list[Arrival]:
        """Every request in the order of arrival, the same for the same seed.

        Random prompts use token ids from 3 (after pad, begin and end) up to ``vocab_size``.
        """
        rng = random.Random(f"{self.name}:{self.seed}")
        prefixes = {
            name: content if isinstance(content, str) else _tokens(rng, content, vocab_size)
            for name, content in self.prefixes.items()
        }
        made = [
            arrival
            for given in self.requests
            for arrival in _expand(given, rng, prefixes, vocab_size)
        ]
        names = [arrival.name for arrival in made]
        for arrival in made:
            if arrival.after and arrival.after not in names:
                raise unknown("request", arrival.after, names)
        return made

    def failures(self, facts: Mapping[str, int | str]) -> list[str]:
        """Statements of ``[expect]`` that the facts do not bear out, in words."""
        said = []
        for key, wanted in self.expect.items():
            if key not in facts:
                raise unknown("fact", key, facts)
            if not _holds(facts[key], wanted):
                said.append(f"{key} is {facts[key]}, expected {wanted}")
        return said


_STATEMENT = re.compile(r"(>=|<=|==|!=|>|<)\s*(-?\d+)")


def _holds(value: int | str, wanted: str | int) -> bool:
    match = _STATEMENT.fullmatch(wanted) if isinstance(wanted, str) else None
    if match and isinstance(value, int):
        return bool(_OPERATORS[match[1]](value, int(match[2])))
    return value == wanted


_KEYS = {
    "name", "count", "prompt", "tokens", "prefix", "max_tokens", "step", "every", "after",
    "abort_after", "n", "temperature", "seed", "beam_width",
}  # fmt: skip


def _expand(
    given: Mapping[str, Any], rng: random.Random, prefixes: Mapping[str, Any], vocab_size: int
) -> list[Arrival]:
    for key in given:
        if key not in _KEYS:
            raise unknown("key of a request", key, _KEYS)
    count, base = given.get("count", 1), given.get("name", "r")
    if given.get("prefix", "") not in ("", *prefixes):
        raise unknown("prefix", given["prefix"], prefixes)
    head = prefixes.get(given.get("prefix", ""), ())
    if ("tokens" in given and (isinstance(head, str) or "prompt" in given)) or (
        "prompt" in given and head and not isinstance(head, str)
    ):
        raise UsageError(f"request {base} mixes text and random tokens in one prompt")
    made = []
    for index in range(count):
        text = given.get("prompt", "")
        tail = () if text else _tokens(rng, _number(given.get("tokens", 0), rng), vocab_size)
        if isinstance(head, str):
            text = head + text
        arrival = Arrival(
            name=f"{base}-{index}" if count > 1 else base,
            text=text,
            token_ids=() if text else (*head, *tail),
            max_tokens=_number(given.get("max_tokens", 16), rng),
            step=given.get("step", 0) + index * given.get("every", 0),
        )
        same = ("after", "abort_after", "n", "temperature", "seed", "beam_width")
        made.append(replace(arrival, **{key: given[key] for key in same if key in given}))
    return made


def _tokens(rng: random.Random, count: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3, vocab_size) for _ in range(count))


def _number(given: int | Mapping[str, float], rng: random.Random) -> int:
    """A number, or one drawn from a log-normal distribution with median, sigma, min and max."""
    if isinstance(given, int):
        return given
    if not isinstance(given, Mapping) or not {"median", "sigma"} <= given.keys():
        raise UsageError(f"{given!r} is neither a number nor a table with median and sigma")
    for key in given:
        if key not in ("median", "sigma", "min", "max"):
            raise unknown("key of a distribution", key, ("median", "sigma", "min", "max"))
    drawn = given["median"] * exp(rng.gauss(0.0, given["sigma"]))
    return int(min(max(drawn, given.get("min", 1)), given.get("max", 1 << 30)))


def names() -> list[str]:
    """Names of all scenarios, in the order in which a learner meets them."""
    folder = resources.files("vllm_trace.scenarios")
    found = [Path(str(f)).stem for f in folder.iterdir() if str(f).endswith(".toml")]
    order = (
        "hello", "batch", "chunked", "prefix", "boundary", "evict", "preempt",
        "parallel", "abort", "long", "mixed",
    )  # fmt: skip
    return sorted(found, key=lambda n: (order.index(n) if n in order else len(order), n))


def load(name: str) -> Scenario:
    """The scenario of that name, or of the TOML file at that path.

    Raises: ``UsageError`` when there is none, or it has a key that does not exist, or lacks one.
    """
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise UsageError(f"there is no scenario file {name}")
        text, name = path.read_text(encoding="utf-8"), path.stem
    else:
        if name not in names():
            raise unknown("scenario", name, names())
        found = resources.files("vllm_trace.scenarios") / f"{name}.toml"
        text = found.read_text(encoding="utf-8")
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"scenario {name}: {error}") from None
    known = Scenario.__dataclass_fields__.keys() - {"name"}
    for key in data:
        if key not in known:
            raise unknown(f"key of scenario {name}", key, known)
    for key in ("title", "shows", "engine", "requests"):
        if key not in data:
            raise UsageError(f"scenario {name} has no {key}")
    if "model" not in data["engine"]:
        raise UsageError(f"scenario {name} names no model", hint='[engine] model = "tiny-llama"')
    for key, wanted in data.get("expect", {}).items():
        if str(wanted)[:1] in "<>=!" and not _STATEMENT.fullmatch(str(wanted)):
            raise UsageError(f"scenario {name}: {key} = {wanted!r} is no statement", hint=">= 1")
    data["requests"] = tuple(data["requests"])
    made = Scenario(name=name, **data)
    # Once for nothing, so that a mistake in a request shows before an engine is started.
    made.arrivals(vocab_size=512)
    return made
