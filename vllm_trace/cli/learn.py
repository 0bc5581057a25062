"""``learn``: the learning plan, walked: steps to read, run, see and answer, and exercises."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_trace.cli import learn_steps
from vllm_trace.cli.parser import AddVerb
from vllm_trace.cli.printing import print_json, say
from vllm_trace.cli.talking import show
from vllm_trace.errors import UsageError, unknown

WORDS = ("check", "path", "read", "run", "see", "sources", "start")


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
        return learn_steps.step(arguments, progress, _one(words, "step"))
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
    part = {"read": learn_steps.read, "run": learn_steps.run, "see": learn_steps.see,
            "check": learn_steps.check}[verb]  # fmt: skip
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
    show([f"# Where the plan's references are ({lesson.whose(tree)})"])
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
