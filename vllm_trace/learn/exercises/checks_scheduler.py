"""Checks of the exercises about the scheduler, and about a trace with a fault. They need no torch."""

from __future__ import annotations

from typing import Any

from vllm_trace.learn import book as books
from vllm_trace.learn import runs
from vllm_trace.learn.exercises import faults
from vllm_trace.learn.exercises.grader import Check, Desk, require
from vllm_trace.trace import read_trace

# Exercise 8 --------------------------------------------------------------------------------


def _room(module: Any, desk: Desk) -> None:
    make = module.Running
    running = [make("a", 31, 1), make("b", 33, 2)]
    got = module.schedule(running, 0, 32)
    require(
        (list(got[0]), list(got[1])) == (["a", "b"], []),
        f"a has 31 tokens in 1 block of 32 and b 33 in 2; nobody needs a block: {got}",
        "The new token fits: nobody gives way.",
    )
    require(len(running) == 2, "the caller's list was changed", "Work on a copy.")


def _gives_way(module: Any, desk: Desk) -> None:
    make = module.Running
    cases = [
        ([("a", 32, 1), ("b", 40, 2), ("c", 40, 2)], 0, (["a", "b"], ["c"]),
         "a needs a block, none is free: the youngest gives way, and what is left is free"),
        ([("a", 32, 1), ("b", 32, 1), ("c", 40, 2)], 0, (["a", "b"], ["c"]), "c had enough for both"),
        ([("a", 10, 1), ("b", 32, 1)], 0, (["a"], ["b"]), "b is the youngest itself"),
        ([("a", 32, 1), ("b", 32, 1), ("c", 10, 1)], 1, (["a", "b"], ["c"]), "a takes the free one"),
        ([("a", 32, 1)], 0, ([], ["a"]), "it gives way to nobody, and still cannot run"),
    ]  # fmt: skip
    for rows, free, wanted, why in cases:
        got = module.schedule([make(*row) for row in rows], free, 32)
        require(
            (list(got[0]), list(got[1])) == wanted,
            f"{rows} (name, tokens, blocks), {free} free, blocks of 32: {got}, and it should be {wanted}",
            why,
        )


def _like_the_scheduler(module: Any, desk: Desk) -> None:
    trace = read_trace(runs.shipped("preempt"))
    made = books.read(trace)
    held: dict[int, int] = {}
    free = made.config.num_blocks - 1
    victims = [(number, event.request) for number, event in made.preempted]
    judged, previous = 0, None
    for step in made.steps:
        scheduled = step.scheduled
        lost = [
            r for number, r in victims if (previous.event if previous else 0) < number < step.event
        ]
        if previous is not None and not scheduled.new and not scheduled.resumed:
            order = [
                r
                for r in previous.counts
                if r not in made.finished or r in step.counts or r in lost
            ]
            rows = [
                module.Running(made.name(r), previous.before[r] + previous.counts[r], held[r])
                for r in order
            ]
            got = module.schedule(rows, free, made.block_size)
            wanted = ([made.name(r) for r in step.counts], [made.name(r) for r in lost])
            require(
                (list(got[0]), list(got[1])) == wanted,
                f"step {step.number} of the trace preempt: {rows}, {free} free: vLLM scheduled "
                f"{wanted[0]} and preempted {wanted[1]}; you {got[0]} and {got[1]}",
            )
            judged += 1
        held = {r: len(table) for r, table in step.tables.items()}
        free = scheduled.num_free_blocks
        previous = step if all(made_last(made, r, step) for r in step.counts) else None
    desk.note(
        f"{judged} steps of a real scheduler decided alike, {len(victims)} preemption among them."
    )


def made_last(made: Any, request: int, step: Any) -> bool:
    """Whether nobody leaves after this step: then the next one begins with the same requests."""
    later = [s for s in made.steps if s.number > step.number and request in s.counts]
    return bool(later)


# Exercise 9 --------------------------------------------------------------------------------


def _finds_nothing(module: Any, desk: Desk) -> None:
    for scenario in ("batch", "preempt", "prefix"):
        got = module.find_fault(faults.clean(scenario))
        require(
            got is None,
            f"the trace {scenario!r} is clean, and you found event {got}",
            "A block whose count fell to 0 may be taken again; a touch counts too.",
        )


def _finds_it(module: Any, desk: Desk) -> None:
    path = desk.path.with_name("ex9.vtrace")
    require(
        path.is_file(),
        "ex9.vtrace does not lie beside your file",
        "vllm-trace learn start ex9 --again",
    )
    _, number = faults.inject(faults.clean("batch"), desk.seed)
    got = module.find_fault(list(read_trace(path).events()))
    require(
        got == number,
        f"in ex9.vtrace you found {got!r}",
        _hint_of(got, number),
    )


def _hint_of(got: Any, number: int) -> str:
    if not isinstance(got, int):
        return "There is one: go through blocks.taken, and keep who is held beside you."
    if abs(got - number) == 1:
        return "Nearly: events count from 1."
    return f"It is {'before' if got > number else 'after'} that one."


def _finds_others(module: Any, desk: Desk) -> None:
    for turn, scenario in enumerate(("batch", "prefix", "mixed", "preempt")):
        events, number = faults.inject(faults.clean(scenario), desk.seed + turn + 1)
        got = module.find_fault(events)
        require(
            got == number, f"in another trace ({scenario}) you found {got!r}", _hint_of(got, number)
        )


CHECKS: dict[str, list[Check]] = {
    "ex8": [
        ("nobody gives way when there is room", _room),
        ("who gives way", _gives_way),
        ("the decisions of a real scheduler", _like_the_scheduler),
    ],
    "ex9": [
        ("clean traces are clean", _finds_nothing),
        ("the fault in your trace", _finds_it),
        ("and in others", _finds_others),
    ],
}
