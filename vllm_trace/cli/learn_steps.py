"""The four parts of a step of ``learn``: read, run, see, check."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from vllm_trace.cli.printing import print_json, say
from vllm_trace.cli.progress import Progress
from vllm_trace.cli.talking import show, talks, typed
from vllm_trace.errors import UsageError, VllmTraceError, unknown

LONG = 120
"""Lines of a passage that is one of several in the pager."""
TRIES = 3
"""Wrong answers to a question before its hints come without asking."""


def tree_of(arguments: argparse.Namespace) -> Any:
    from vllm_trace.learn.passages import Tree

    return Tree.at(arguments.source[0]) if arguments.source else Tree.installed()


def step(arguments: argparse.Namespace, progress: Any, name: str) -> int:
    """A step: on a terminal part after part, else its text."""
    from vllm_trace.learn import lesson, plan

    one = plan.step(name)
    tree = tree_of(arguments)
    progress.note_opened(one.name)
    if arguments.json:
        print_json({"schema": 1, "step": one.number, "title": one.title, "goal": one.goal,
                    "idea": one.idea, "scenario": one.scenario, "read": _places(one, tree)})  # fmt: skip
        return 0
    show(lesson.opening(one, tree, progress))
    if not talks():
        return 0
    parts = {"read": read, "run": run, "see": see, "check": check}
    for part, function in parts.items():
        said = typed(f"\n[Enter] {part}  [s] skip  [q] leave > ")
        if said.lower().startswith("q"):
            return 0
        if said.lower().startswith("s"):
            continue
        try:
            function(arguments, progress, [one.name])
        except VllmTraceError as error:
            say(str(error), error.hint)
    return 0


def _places(one: Any, tree: Any) -> list[dict[str, Any]]:
    from vllm_trace.learn import lesson, passages

    made = []
    for reference in passages.of_step(one.number):
        found = lesson.place_of(reference, tree)
        made.append(
            {
                "id": reference.id,
                "said": reference.said,
                "lines": reference.lines,
                "release": reference.release,
                "fate": reference.fate,
                "became": reference.became,
                "file": found.file if found else None,
                "line": found.line if found else None,
                "successor": bool(found and found.successor),
            }
        )
    return made


def read(arguments: argparse.Namespace, progress: Any, words: list[str]) -> int:
    from vllm_trace.learn import lesson, passages, plan

    one = plan.step(words[0])
    tree = tree_of(arguments)
    progress.note_opened(one.name)
    chosen = passages.of_step(one.number)
    if len(words) > 2:
        raise UsageError(f"{words[2]!r} is one word too many", hint="vllm-trace learn read 5 ID")
    if len(words) == 2:
        found = [reference for reference in chosen if reference.id == words[1]]
        if not found:
            raise unknown(f"reference of step {one.number}", words[1], [r.id for r in chosen])
        chosen = found
    if arguments.json:
        print_json({"schema": 1, "step": one.number, "read": _places(one, tree)})
    elif len(words) == 1 and not talks():
        show(lesson.reading(one, tree))
    elif len(words) == 1:
        show(lesson.reading(one, tree))
        readable = [r for r in chosen if _text_of(r, tree)]
        if readable and typed("[Enter] the source  [s] skip > ").lower()[:1] not in ("s", "q"):
            _page(readable, tree, one.number)
    elif talks():
        _page(chosen, tree, one.number)
    else:
        _passage(chosen[0], tree, arguments.all)
    return 0


def _text_of(reference: Any, tree: Any) -> Any:
    """Where its text is, or None when there is none here."""
    found = tree.find(reference) if tree else None
    return found if found and found.line and (tree.root / found.file).is_file() else None


def _passage(reference: Any, tree: Any, whole: bool) -> None:
    from vllm_trace.learn import lesson

    show(lesson.about(reference, tree)[1:])
    found = _text_of(reference, tree)
    if found is None:
        where = (
            "CUDA sources are not part of an installed vLLM" if reference.is_cuda else "no source"
        )
        print(f"\n({where}: nothing to show)")
        return
    lines, left = lesson.excerpt(found, tree, whole)
    print("\n" + "\n".join(lines))
    if left:
        print(left)


def _page(chosen: Sequence[Any], tree: Any, number: int) -> None:
    """Highlighted, in the reader's pager. Of several passages each is cut after a few screens."""
    from rich.syntax import Syntax
    from rich.text import Text

    from vllm_trace.cli.printing import console
    from vllm_trace.learn import lesson
    from vllm_trace.learn.passages import Passage

    terminal = console()
    os.environ.setdefault("LESS", "-R")  # else less shows colours as their codes
    with terminal.pager(styles=not terminal.no_color):
        if len(chosen) > 1:
            terminal.print(
                f"{len(chosen)} passages, one after the other (less: / searches, q leaves)"
            )
        for reference in chosen:
            for line in lesson.about(reference, tree):
                terminal.print(Text(line.removeprefix("# "), style="bold" * line.startswith("# ")))
            found = _text_of(reference, tree)
            if found is None:
                continue
            low, high = found.line, found.end
            if low == high:
                low, high = max(1, low - 6), high + 6
            left = high - low + 1 - LONG if len(chosen) > 1 else 0
            high -= max(0, left)
            text = "\n".join(tree.text(Passage(found.file, found.name, low, high)))
            language = "python" if found.file.endswith(".py") else "cuda"
            terminal.print(
                Syntax(text, language, line_numbers=True, start_line=low, word_wrap=True,
                       theme="ansi_dark", background_color="default")
            )  # fmt: skip
            if left > 0:
                terminal.print(
                    f"… {left} lines more: vllm-trace learn read {number} {reference.id}"
                )


def run(arguments: argparse.Namespace, progress: Any, words: list[str]) -> int:
    from vllm_trace.learn import plan, runs

    one = plan.step(words[0])
    kept = runs.trace_of(progress, one.scenario)
    if kept.own and not arguments.again:
        if arguments.json:
            print_json(
                {"schema": 1, "scenario": one.scenario, "trace": str(kept.path), "new": False}
            )
        else:
            print(f"You have a run of {one.scenario!r} already (--again makes another).")
        return 0
    if not runs.has_vllm():
        print(
            f"There is no vLLM here: step {one.number} uses the shipped trace of {one.scenario!r}."
        )
        return 0
    with Progress(f"running {one.scenario!r} on a real engine"):
        made, seconds, _ = runs.run(progress, one.scenario)
    if arguments.json:
        print_json({"schema": 1, "scenario": one.scenario, "trace": str(made.path), "new": True})
    else:
        print(f"Ran {one.scenario!r} in {seconds:.1f} s; the trace is kept for this step.")
        print(f"vllm-trace learn see {one.number}")
    return 0


def _book(arguments: argparse.Namespace, progress: Any, one: Any) -> tuple[Any, Any]:
    from vllm_trace.learn import book, runs

    if arguments.trace:
        source = runs.Evidence(arguments.trace.name, arguments.trace, own=True, given=True)
    else:
        source = runs.trace_of(progress, one.scenario)
    return book.read(source.open()), source


def see(arguments: argparse.Namespace, progress: Any, words: list[str]) -> int:
    from vllm_trace.learn import lesson, plan

    one = plan.step(words[0])
    book, source = _book(arguments, progress, one)
    progress.note_opened(one.name)
    lines = lesson.seeing(one, book, source)
    if arguments.json:
        print_json({"schema": 1, "step": one.number, "own": source.own, "lines": lines})
    else:
        show(lines)
    return 0


def check(arguments: argparse.Namespace, progress: Any, words: list[str]) -> int:
    from vllm_trace.learn import lesson, plan, questions

    one = plan.step(words[0])
    book, source = _book(arguments, progress, one)
    progress.note_opened(one.name)
    asked = questions.ask(book, one.questions, arguments.seed or progress.seed_of(one.name))
    if arguments.answer:
        return _judge(arguments, progress, one, asked)
    if arguments.json:
        listed = [{"id": q.id, "text": q.text, "choices": q.choices} for q in asked]
        print_json({"schema": 1, "step": one.number, "own": source.own, "questions": listed})
        return 0
    show(lesson.checking(one, source))
    if talks():
        return _converse(progress, one, asked)
    for number, each in enumerate(asked, 1):
        show(lesson.asking(number, len(asked), each))
        if arguments.hint:
            show([f"   hint: {hint}"[: lesson.WIDTH] for hint in each.hints])
    print(f"\nvllm-trace learn check {one.number}" + " --answer …" * len(asked))
    return 0


def _judge(arguments: argparse.Namespace, progress: Any, one: Any, asked: Sequence[Any]) -> int:
    """Answers from the command line."""
    from vllm_trace.learn import lesson, questions

    given = arguments.answer
    if len(given) > len(asked):
        raise UsageError(f"step {one.number} has {len(asked)} questions, and there are {len(given)} "
                         "answers", hint=f"vllm-trace learn check {one.number}")  # fmt: skip
    rows = []
    for each, answer in zip(asked, given):
        right = each.is_right(answer)
        rows.append({"id": each.id, "given": answer, "right": right,
                     "said": each.why if right else each.judge(answer)})  # fmt: skip
    passed = len(rows) == len(asked) and all(row["right"] for row in rows)
    if arguments.json:
        print_json({"schema": 1, "step": one.number, "passed": passed, "answers": rows})
    else:
        for number, (each, row) in enumerate(zip(asked, rows), 1):
            show(lesson.asking(number, len(asked), each))
            if row["right"]:
                show(lesson.wrap(f"{row['given']}: right. {each.why}", "   ", "   "))
                continue
            show(lesson.explained(each, row["given"]))
            show(
                [
                    line
                    for hint in each.hints
                    for line in lesson.wrap(hint, "         ", "   hint: ")
                ]
            )
            if each.look:
                print(f"   look: vllm-trace show TRACE {each.look}"[:79])
        left = len(asked) - len(rows)
        if left:
            print(f"\n{questions.many(left, 'question')} without an answer.")
    if passed:
        _passed(progress, one, quiet=arguments.json)
    return 0 if passed else 1


def _converse(progress: Any, one: Any, asked: Sequence[Any]) -> int:
    """Answers typed in; until each is right, or the reader gives up."""
    from vllm_trace.learn import lesson

    print("(? for a hint, . to be shown, q to leave)")
    found = 0
    for number, each in enumerate(asked, 1):
        show(lesson.asking(number, len(asked), each))
        hints, wrong = list(each.hints), 0
        while True:
            said = typed("   > ")
            if said in ("q", "quit"):
                return 1
            if said == ".":
                show(lesson.wrap(each.why, "   ", "   "))
                break
            if said in ("", "?"):
                show(lesson.wrap(hints.pop(0) if hints else "that was the last hint", "   ", "   "))
                continue
            if each.is_right(said):
                show(lesson.wrap(f"Right. {each.why}", "   ", "   "))
                found += 1
                break
            wrong += 1
            show(lesson.explained(each, said))
            if wrong >= TRIES and hints:
                show(lesson.wrap(f"hint: {hints.pop(0)}", "   ", "   "))
    if found < len(asked):
        print(
            f"\n{found} of {len(asked)}. Other questions wait: vllm-trace learn check {one.number}"
        )
        progress.note_attempt(one.name)
        return 1
    _passed(progress, one)
    return 0


def _passed(progress: Any, one: Any, quiet: bool = False) -> None:
    from vllm_trace.learn import plan

    progress.note_attempt(one.name)
    progress.note_passed(one.name)
    if quiet:
        return
    print(f"\nStep {one.number} is passed.", end=" ")
    left = [step for step in plan.steps() if step.name not in progress.passed]
    after = next((step for step in left if step.number > one.number), left[0] if left else None)
    print(f"Next: vllm-trace learn {after.number}" if after else "That was the last one.")
