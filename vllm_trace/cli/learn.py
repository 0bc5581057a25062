"""``learn``: the learning plan, walked: steps to read, run, see and answer, and exercises."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_trace.cli.parser import AddVerb
from vllm_trace.cli.printing import print_json, say
from vllm_trace.errors import UsageError, VllmTraceError, unknown

WORDS = ("check", "path", "read", "run", "see", "sources", "start")
TRIES = 3
"""Wrong answers to a question before its hints come without asking."""


def add(verb: AddVerb) -> None:
    learn = verb(
        "learn", _learn, "Walk the learning plan: read, run, see, check; and exercises", "learn check 5"
    )  # fmt: skip
    learn.add_argument(
        "words", nargs="*", metavar="WORD",
        help="a step; read, run, see or check STEP; start or check EXERCISE; path NAME; sources",
    )  # fmt: skip
    learn.add_argument("--answer", action="append", default=[], help="check: an answer, in order")
    learn.add_argument("--hint", action="store_true", help="check: print hints too")
    learn.add_argument("--trace", type=Path, help="see, check: look at this trace instead")
    learn.add_argument("--seed", default="", help="check: other questions, the same each time")
    learn.add_argument("--again", action="store_true", help="run, start: anew")
    learn.add_argument("--all", action="store_true", help="read: the whole passage")
    learn.add_argument("--watch", action="store_true", help="check: again each time you save")
    learn.add_argument("--dir", type=Path, default=Path("."), help="start, check: your folder")
    learn.add_argument(
        "--source", type=Path, action="append", default=[], metavar="DIR",
        help="read, sources: an unpacked vLLM instead of the installed one",
    )  # fmt: skip
    learn.add_argument("--save", action="store_true", help="sources: rewrite the table and page")


def _learn(arguments: argparse.Namespace) -> int:
    from vllm_trace.learn.progress import Progress

    progress = Progress.load()
    if progress.set_aside:
        say(
            f"the progress file was damaged; it is kept as {progress.set_aside}, and a new one begun"
        )
    words: list[str] = list(arguments.words)
    if not words:
        return _map(arguments, progress)
    verb = words.pop(0) if words[0] in WORDS else ""
    if not verb:
        if words[0].isalpha() and _near_word(words[0]):
            raise unknown("word", words[0], [*WORDS], "vllm-trace learn --help")
        if _is_exercise(words[0]):
            return _exercise_text(arguments, progress, words[0])
        return _step(arguments, progress, _one(words, "step"))
    if verb == "sources":
        return _sources(arguments)
    if verb == "path":
        return _path(arguments, progress, words)
    if verb == "start":
        return _start(arguments, progress, _one(words, "exercise"))
    if verb == "check" and words and _is_exercise(words[0]):
        return _grade(arguments, progress, _one(words, "exercise"))
    if not words:
        raise UsageError(f"learn {verb} needs a step", hint=f"vllm-trace learn {verb} 1")
    part = {"read": _read, "run": _run, "see": _see, "check": _check}[verb]
    if verb != "read":
        _one(words, "step")
    return part(arguments, progress, words)


def _one(words: Sequence[str], what: str) -> str:
    if len(words) != 1:
        said = f"{words[1]!r} is one word too many" if words else f"which {what}?"
        raise UsageError(said, hint="Try: vllm-trace learn --help")
    return words[0]


def _near_word(word: str) -> bool:
    from difflib import get_close_matches

    from vllm_trace.learn import plan

    if any(word in plan.slug(one) for one in plan.steps()):
        return False
    return bool(get_close_matches(word, WORDS, n=1, cutoff=0.6))


def _is_exercise(name: str) -> bool:
    from vllm_trace.learn import exercises

    return exercises.looks_like(name)


def _tree(arguments: argparse.Namespace) -> Any:
    from vllm_trace.learn.passages import Tree

    return Tree.at(arguments.source[0]) if arguments.source else Tree.installed()


def show(lines: Sequence[str]) -> None:
    """Headings in bold on a terminal; plain text without ``# `` else."""
    if not sys.stdout.isatty():
        print("\n".join(line.removeprefix("# ") for line in lines))
        return
    from rich.text import Text

    from vllm_trace.cli.printing import console

    terminal = console()
    for line in lines:
        heading = line.startswith("# ")
        terminal.print(Text(line.removeprefix("# "), style="bold" if heading else ""))


def _talks() -> bool:
    """Somebody sits there: answers can be typed."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def _asked(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        print()
        return "q"


# The map and the paths ---------------------------------------------------------------------


def _map(arguments: argparse.Namespace, progress: Any) -> int:
    from vllm_trace.learn import exercises, lesson, plan

    listed = [(one.name, one.title) for one in exercises.all_of_them()]
    if not arguments.json:
        show(lesson.overview(progress, listed))
        return 0
    print_json(
        {
            "schema": 1,
            "steps": [
                {
                    "number": one.number,
                    "phase": one.phase,
                    "title": one.title,
                    "minutes": one.minutes,
                    "scenario": one.scenario,
                    "opened": progress.opened.get(one.name),
                    "passed": progress.passed.get(one.name),
                }
                for one in plan.steps()
            ],
            "exercises": [
                {"name": name, "title": title, "passed": progress.passed.get(name)}
                for name, title in listed
            ],
            "paths": {name: way.minutes for name, way in plan.paths().items()},
        }
    )
    return 0


def _path(arguments: argparse.Namespace, progress: Any, words: Sequence[str]) -> int:
    from vllm_trace.learn import lesson, plan

    chosen = [plan.path(_one(words, "path"))] if words else list(plan.paths().values())
    if arguments.json:
        ways = [
            {
                "name": way.name,
                "minutes": way.minutes,
                "stops": [[s.command, s.minutes, s.why] for s in way.stops],
            }
            for way in chosen
        ]
        print_json({"schema": 1, "paths": ways})
    elif words:
        show(lesson.path_lines(chosen[0], progress))
    else:
        show([f"{way.name:11} {way.minutes:>4} min  {way.goal}" for way in chosen])
    return 0


# Steps -------------------------------------------------------------------------------------


def _step(arguments: argparse.Namespace, progress: Any, name: str) -> int:
    """A step: on a terminal part after part, else its text."""
    from vllm_trace.learn import lesson, plan

    one = plan.step(name)
    tree = _tree(arguments)
    progress.note_opened(one.name)
    if arguments.json:
        print_json({"schema": 1, "step": one.number, "title": one.title, "goal": one.goal,
                    "idea": one.idea, "scenario": one.scenario, "read": _places(one, tree)})  # fmt: skip
        return 0
    show(lesson.opening(one, tree, progress))
    if not _talks():
        return 0
    parts = {"read": _read, "run": _run, "see": _see, "check": _check}
    for part, function in parts.items():
        said = _asked(f"\n[Enter] {part}  [s] skip  [q] leave > ")
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


def _read(arguments: argparse.Namespace, progress: Any, words: list[str]) -> int:
    from vllm_trace.learn import lesson, passages, plan

    one = plan.step(words[0])
    tree = _tree(arguments)
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
    elif len(words) == 1 and not _talks():
        show(lesson.reading(one, tree))
    elif len(words) == 1:
        show(lesson.reading(one, tree))
        readable = [r for r in chosen if _text_of(r, tree)]
        if readable and _asked("[Enter] the source  [s] skip > ").lower()[:1] not in ("s", "q"):
            _page(readable, tree)
    elif _talks():
        _page(chosen, tree)
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


def _page(chosen: Sequence[Any], tree: Any) -> None:
    """Highlighted, in the reader's pager."""
    from rich.syntax import Syntax
    from rich.text import Text

    from vllm_trace.cli.printing import console
    from vllm_trace.learn import lesson
    from vllm_trace.learn.passages import Passage

    terminal = console()
    os.environ.setdefault("LESS", "-R")  # else less shows colours as their codes
    with terminal.pager(styles=not terminal.no_color):
        for reference in chosen:
            for line in lesson.about(reference, tree):
                terminal.print(Text(line.removeprefix("# "), style="bold" * line.startswith("# ")))
            found = _text_of(reference, tree)
            if found is None:
                continue
            low, high = found.line, found.end
            if low == high:
                low, high = max(1, low - 6), high + 6
            text = "\n".join(tree.text(Passage(found.file, found.name, low, high)))
            language = "python" if found.file.endswith(".py") else "cuda"
            terminal.print(
                Syntax(text, language, line_numbers=True, start_line=low, word_wrap=True,
                       theme="ansi_dark", background_color="default")
            )  # fmt: skip


def _run(arguments: argparse.Namespace, progress: Any, words: list[str]) -> int:
    from vllm_trace.cli.run import _Progress
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
    with _Progress(f"running {one.scenario!r} on a real engine"):
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
        source = runs.Evidence(arguments.trace.name, arguments.trace, own=True)
    else:
        source = runs.trace_of(progress, one.scenario)
    return book.read(source.open()), source


def _see(arguments: argparse.Namespace, progress: Any, words: list[str]) -> int:
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


def _check(arguments: argparse.Namespace, progress: Any, words: list[str]) -> int:
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
    show([f"# Step {one.number}: {one.title}. Check", f"on {source.said}"])
    if _talks():
        return _converse(progress, one, asked)
    for number, each in enumerate(asked, 1):
        show(lesson.asking(number, len(asked), each))
        if arguments.hint:
            show([f"   hint: {hint}"[: lesson.WIDTH] for hint in each.hints])
    print(f"\nvllm-trace learn check {one.number}" + " --answer …" * len(asked))
    return 0


def _judge(arguments: argparse.Namespace, progress: Any, one: Any, asked: Sequence[Any]) -> int:
    """Answers from the command line."""
    from vllm_trace.learn import lesson

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
            print(f"\n{left} question(s) without an answer.")
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
            said = _asked("   > ")
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


# Sources -----------------------------------------------------------------------------------


def _sources(arguments: argparse.Namespace) -> int:
    from vllm_trace.learn import lesson, passages, sourcemap

    trees = [passages.Tree.at(folder) for folder in arguments.source]
    if arguments.save:
        if not trees:
            raise UsageError("--save needs sources", hint="learn sources --source DIR --save")
        for path in sourcemap.save(trees):
            print(path.name)
        return 0
    tree = trees[0] if trees else passages.Tree.installed()
    rows = {}
    for reference in passages.references():
        found = lesson.place_of(reference, tree)
        rows[reference.id] = found.to_list() if found else None
    if arguments.json:
        print_json({"schema": 1, "vllm": tree.release if tree else None, "places": rows})
        return 0
    show([f"# Where the plan's references are ({lesson._whose(tree)})"])
    if tree is not None and not passages.known_as(tree.release):
        show(lesson.wrap(f"vLLM {tree.release} is not in the table: found by name."))
    for reference in passages.references():
        show([f"{reference.id:26} {lesson.where_now(reference, tree)}"])
    lost = [
        r.id for r in passages.references() if not rows[r.id] and r.fate not in ("removed", "never")
    ]
    print(f"\n{sum(bool(at) for at in rows.values())} of {len(rows)} found; "
          + (f"not found: {', '.join(lost)}" if lost else "the others are known to be gone"))  # fmt: skip
    return 0


# Exercises ---------------------------------------------------------------------------------


def _exercise_text(arguments: argparse.Namespace, progress: Any, name: str) -> int:
    from vllm_trace.learn import exercises

    one = exercises.exercise(name)
    show(exercises.opening(one, progress))
    return 0


def _start(arguments: argparse.Namespace, progress: Any, name: str) -> int:
    from vllm_trace.learn import exercises

    one = exercises.exercise(name)
    files = exercises.start(one, progress, arguments.dir, again=arguments.again)
    if arguments.json:
        print_json({"schema": 1, "exercise": one.name, "files": [str(path) for path in files]})
        return 0
    show(exercises.opening(one, progress))
    print(f"\nYour file: {files[0]}")
    return 0


def _grade(arguments: argparse.Namespace, progress: Any, name: str) -> int:
    from vllm_trace.learn import exercises, watching

    one = exercises.exercise(name)
    path = exercises.file_of(one, progress, arguments.dir)

    def once() -> int:
        result = exercises.check(one, path, progress, answers=arguments.answer)
        if arguments.json:
            print_json(result.to_dict())
        else:
            show(exercises.told(one, result))
        return 0 if result.passed else 1

    code = once()
    if not arguments.watch:
        return code
    for _ in watching.changes(path):
        print()
        code = once()
    return code
