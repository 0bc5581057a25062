"""Questions about a trace: the answer is computed from it, never written down.

A maker takes a ``Book`` and a random generator and returns a ``Question``. The same seed asks the
same; another trace or seed asks for other blocks, positions and steps. Makers are in the
``asking`` modules; this is what they make and how an answer is judged.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vllm_trace.learn.book import Book

Maker = Callable[[Book, random.Random], "Question"]
MAKERS: dict[str, Maker] = {}


@dataclass(frozen=True)
class Question:
    """One question, with all that can be said to an answer."""

    text: str
    answer: str
    why: str
    """The way to the answer, with its numbers; said after it was found."""
    hints: tuple[str, ...]
    choices: tuple[str, ...] = ()
    wrong: dict[str, str] = field(default_factory=dict)
    """Mistakes that people make here → what was overlooked."""
    look: str = ""
    """Where in the trace it can be seen, as arguments of ``vllm-trace show``."""
    id: str = ""

    @property
    def is_list(self) -> bool:
        return "," in self.answer

    def is_right(self, given: str) -> bool:
        return normal(given) == normal(self.answer)

    def judge(self, given: str) -> str:
        """What is wrong with an answer: a known mistake, or how far off it is. Never the answer."""
        said = normal(given)
        for mistake, text in self.wrong.items():
            if normal(mistake) == said:
                return text
        if not said:
            return "there is no answer"
        if self.choices:
            known = [normal(choice) for choice in self.choices]
            if said not in known:
                return f"{given!r} is none of {', '.join(self.choices)}"
            return "it is another one"
        if not all(part.lstrip("-").isdecimal() for part in said.split()):
            return f"{given!r} is no number: answer with " + (
                "numbers and commas between" if self.is_list else "one number"
            )
        if self.is_list:
            return _list_off(said.split(), normal(self.answer).split())
        if " " in said or "-" in said.lstrip("-"):
            return f"{given!r} is not one number"
        off = int(said) - int(normal(self.answer))
        return ("too large" if off > 0 else "too small") + (" by one" if abs(off) == 1 else "")


def _list_off(given: list[str], right: list[str]) -> str:
    if len(given) != len(right):
        more = "many" if len(given) > len(right) else "few"
        return f"too {more}: {len(given)} numbers, and there are {len(right)}"
    if sorted(given) == sorted(right):
        return "the right numbers in another order"
    place = next(i for i, (a, b) in enumerate(zip(given, right)) if a != b)
    return f"number {place + 1} of the list is another one"


def many(number: int, noun: str) -> str:
    """``1 block``, ``2 blocks``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def normal(text: str) -> str:
    """Small letters, one blank between words, commas and thousands' marks aside."""
    cleaned = text.strip().lower().replace("_", "")
    return " ".join(cleaned.replace(",", " ").replace(";", " ").split())


def question(maker: Maker) -> Maker:
    """Register a maker under its name."""
    MAKERS[maker.__name__] = maker
    return maker


def ask(book: Book, names: Sequence[str], seed: str) -> list[Question]:
    """The questions of a step for this trace and seed."""
    # They register their makers.
    from vllm_trace.learn import (  # noqa: F401
        asking,
        asking_cache,
        asking_kernels,
        asking_part3,
        asking_steps,
    )

    made = []
    for name in names:
        one = MAKERS[name](book, random.Random(f"{seed}:{name}"))
        # A mistake that happens to give the right number is none.
        wrong = {k: v for k, v in one.wrong.items() if normal(k) != normal(one.answer)}
        made.append(
            Question(
                one.text, one.answer, one.why, one.hints, one.choices, wrong, one.look, id=name
            )
        )
    return made
