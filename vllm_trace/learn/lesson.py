"""The parts of a step as lines of text: at most 80 columns, at most two screens a part.

Nothing here prints. Lines that begin with ``# `` are headings, which a terminal shows in bold.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from vllm_trace.learn import evidence_steps, passages, plan, runs  # noqa: F401 - registers views
from vllm_trace.learn.book import Book
from vllm_trace.learn.evidence import EVIDENCE
from vllm_trace.learn.passages import Passage, Reference, Tree
from vllm_trace.learn.progress import Progress
from vllm_trace.learn.questions import Question

WIDTH = 78
SCREEN = 24
EXCERPT = 26
"""Lines of a passage that a pipe gets without ``--all``."""
NAME = 25
"""Width of the longest reference's id."""

CONCEPT = (
    "# 1 The concept",
    "    the blog: https://blog.vllm.ai/2023/06/20/vllm.html",
    "    the paper: https://arxiv.org/abs/2309.06180, sections 3 and 4",
)


def wrap(text: str, indent: str = "", first: str | None = None) -> list[str]:
    """A paragraph as lines."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent if first is None else first,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


# The map -----------------------------------------------------------------------------------


def overview(progress: Progress, exercises: Sequence[tuple[str, str]]) -> list[str]:
    """All phases, steps and exercises, with what was passed."""
    done = sum(one.name in progress.passed for one in plan.steps())
    made = sum(name in progress.passed for name, _ in exercises)
    lines = [
        f"# The learning plan: {done} of {len(plan.steps())} steps and {made} of "
        f"{len(exercises)} exercises passed",
        "",
        *CONCEPT,
    ]
    phase = ""
    for one in plan.steps():
        if one.phase != phase:
            phase = one.phase
            lines.append(f"# {phase}")
        lines.append(
            f"{_mark(progress, one.name)} {one.number:>2}  {one.title:30} {one.minutes:>3} min  "
            f"{', '.join(one.exercises)}".rstrip()
        )
    lines.append("# Exercises")
    for name, title in exercises:
        lines.append(f"{_mark(progress, name)} {name:10}  {title}"[:WIDTH])
    left = [one.name for one in plan.steps() if one.name not in progress.passed]
    after = f"Next: vllm-trace learn {left[0]}" if left else "All steps are passed"
    return [*lines, "", f"{after}  (start ex1 | path {'|'.join(plan.paths())})"]


def _mark(progress: Progress, name: str) -> str:
    return "[x]" if name in progress.passed else "[.]" if name in progress.opened else "[ ]"


def path_lines(way: plan.LearningPath, progress: Progress) -> list[str]:
    """A path with its stops and honest times."""
    lines = [
        f"# {way.title}: {way.minutes // 60} h {way.minutes % 60:02} min"
        if way.minutes >= 60
        else f"# {way.title}: {way.minutes} min",
        way.goal,
        "",
    ]
    for stop in way.stops:
        words = stop.command.split()
        name = words[-1] if "learn" in words else ""
        mark = _mark(progress, name) if name else "   "
        lines += [f"{mark} {stop.minutes:>3} min  {stop.command}", f"             {stop.why}"]
    said = "Minutes are for reading, running and answering; a run takes about ten seconds."
    if any(stop.is_page for stop in way.stops):
        said += " Pages, docs/…, are in the repository."
    return [*lines, "", *wrap(said)]


# A step ------------------------------------------------------------------------------------


def opening(one: plan.Step, tree: Tree | None, progress: Progress) -> list[str]:
    """What a step is about, where to read, and how to go on."""
    lines = [
        f"# Step {one.number}: {one.title}",
        f"phase {one.phase}, about {one.minutes} minutes"
        + (", passed" if one.name in progress.passed else ""),
        "",
        *wrap(one.goal),
        "",
    ]
    for paragraph in one.idea.strip().split("\n\n"):
        lines += [*wrap(" ".join(paragraph.split())), ""]
    lines.append(f"# Read ({whose(tree)})")
    for reference in passages.of_step(one.number):
        if not reference.inside:
            lines.append(f"  {reference.id:{NAME}}  {where_now(reference, tree)}")
    if inside := [r for r in passages.of_step(one.number) if r.inside]:
        lines.append(f"  {f'and {len(inside)} places inside':{NAME}}  of {inside[0].inside}")
    number = one.number
    lines += ["", f"vllm-trace learn read {number} | run {number} | see {number} | check {number}"]
    if one.exercises:
        lines.append(f"exercises: {', '.join(one.exercises)}")
    return lines


def whose(tree: Tree | None) -> str:
    """Of which vLLM the source is that is read."""
    return (
        f"vLLM {tree.release}"
        if tree
        else f"no vLLM here: by the table, {list(passages.known())[-1]}"
    )


def where_now(reference: Reference, tree: Tree | None, room: int = WIDTH - NAME - 4) -> str:
    """In one line: where it is here, or where it was last."""
    found = place_of(reference, tree)
    if found is not None:
        word = "its work: " if found.successor else ""
        return word + _fit(_at(found), room - len(word))
    release, last = last_place(reference)
    if last is None or not _gone(reference):
        return "not found by name"
    word = f"gone; {release} "
    return word + _fit(_at(last), room - len(word))


def last_place(reference: Reference) -> tuple[str, Passage | None]:
    """The newest release of the table that has the thing itself, and where."""
    for release, places in reversed(list(passages.known().items())):
        if reference.id in places and not places[reference.id][4]:
            return release, Passage(*places[reference.id])
    return "", None


def _fit(text: str, room: int) -> str:
    """The end of an address that is too long: file and line matter most."""
    while len(text) > room and "/" in text:
        text = "…/" + text.removeprefix("…/").partition("/")[2]
    return text


def place_of(reference: Reference, tree: Tree | None) -> Passage | None:
    """Found by name in the source that is there; without one, or for CUDA, as the table has it."""
    if tree is not None:
        found = tree.find(reference)
        if found is not None or tree.has_cuda:
            return found
    release = passages.known_as(tree.release) if tree else list(passages.known())[-1]
    place = passages.known().get(release, {}).get(reference.id)
    if place is None or (tree is not None and not Passage(*place).file.startswith("csrc/")):
        return None
    return Passage(*place)


def _at(found: Passage) -> str:
    lines = "" if not found.line else f":{found.line}"
    return f"{found.file}{lines}"


def reading(one: plan.Step, tree: Tree | None) -> list[str]:
    """Each reference: where the plan had it, where it is, what became of it."""
    lines = [f"# Step {one.number}: {one.title}. Read ({whose(tree)})"]
    if tree is not None and not passages.known_as(tree.release):
        known = ", ".join(passages.known())
        lines += wrap(f"vLLM {tree.release} is not in the table ({known}): found by name.")
    chosen = passages.of_step(one.number)
    whole = [reference for reference in chosen if not reference.inside]
    for reference in whole:
        lines += about(reference, tree, short=len(whole) > 6)
        lines += _inside([r for r in chosen if r.inside == reference.id], tree)
    lines += [""] * (len(lines) < 40)
    return [*lines, f"vllm-trace learn read {one.number} {chosen[0].id}   shows the source itself"]


def _inside(places: Sequence[Reference], tree: Tree | None) -> list[str]:
    """A line or two for each passage of a function: lines as the plan has them, and what is there."""
    lines = []
    for reference in places:
        found = place_of(reference, tree)
        line = int(reference.lines.partition("-")[0])
        moved = f" (here {found.line})" if found and found.line != line else ""
        lines += wrap(f"{reference.lines:9}{reference.about}{moved}", " " * 18, " " * 9)
    return lines


def about(reference: Reference, tree: Tree | None, short: bool = False) -> list[str]:
    """One reference; its text is not in it."""
    lines = [f"# {reference.id}"] if short else ["", f"# {reference.id}"]
    tells = not short or reference.fate != "same"
    if not (short and tells and not reference.is_cuda):
        lines += wrap(reference.about, "  ")
    if reference.said:
        numbers = f":{reference.lines}" if reference.lines else ""
        lines += _labelled("said", f"{reference.said}{numbers} ({reference.release})")
    found = place_of(reference, tree)
    if found is None:
        release, last = last_place(reference)
        if not _gone(reference):
            lines += _labelled("here", "not found by name")
        elif last is not None:
            lines += _labelled("here", f"gone; in {release} it is {_span(last)}")
    else:
        note = " (in the repository only)" if tree and not (tree.root / found.file).exists() else ""
        name = f" {found.name}" if not short and not found.name.startswith("text:") else ""
        word = "its work" if found.successor else "here"
        lines += _labelled(word, f"{_span(found)}{name.rstrip()}{note}")
    if tells:
        lines += _labelled(reference.fate, reference.became)
    return lines


def _labelled(word: str, text: str) -> list[str]:
    return wrap(text, " " * 11, f"  {word:9}")


def _span(found: Passage) -> str:
    return _at(found) + (f"–{found.end}" if found.end > found.line else "")


def _gone(reference: Reference) -> bool:
    return reference.fate in ("removed", "never")


def excerpt(found: Passage, tree: Tree, whole: bool = False) -> tuple[list[str], str]:
    """Numbered lines of a passage, and what was left out. A single line comes with its neighbours."""
    low, high = found.line, found.end
    path = tree.root / found.file
    if low == high:
        low, high = max(1, low - 6), high + 6
    lines = tree.text(Passage(found.file, found.name, low, high))
    left = "" if whole or len(lines) <= EXCERPT else f"… {len(lines) - EXCERPT} lines more (--all)"
    shown = lines if whole else lines[:EXCERPT]
    width = len(str(low + len(shown)))
    room = WIDTH - width - 3
    made = []
    for i, line in enumerate(shown):
        text = line if len(line) <= room or whole else line[: room - 1] + "…"
        made.append(
            f"{low + i:>{width}}{'>' if low != found.line and low + i == found.line else ' '} {text}".rstrip()
        )
    return ([] if not path.is_file() else made), left


def seeing(one: plan.Step, book: Book, source: runs.Evidence) -> list[str]:
    """The evidence in a trace."""
    lines = [f"# Step {one.number}: {one.title}. See", f"in {source.said}", *_not_own(one, source)]
    return [*lines, "", *EVIDENCE[one.see](book), "", *wrap(one.notice)]


def checking(one: plan.Step, source: runs.Evidence) -> list[str]:
    """What stands above a step's questions."""
    return [f"# Step {one.number}: {one.title}. Check", f"on {source.said}", *_not_own(one, source)]


def _not_own(one: plan.Step, source: runs.Evidence) -> list[str]:
    if source.own:
        return []
    if runs.has_vllm():
        return [f"(vllm-trace learn run {one.number} makes your own)"]
    return wrap("(no vLLM here: a golden trace that comes with the package stands in)")


def asking(number: int, total: int, one: Question) -> list[str]:
    """One question as text."""
    lines = ["", *wrap(one.text, "   ", f"{number}. " if total > 1 else "")]
    if one.choices:
        lines += wrap("one of: " + ", ".join(one.choices), "   ", "   ")
    return lines


def explained(one: Question, given: str) -> list[str]:
    """What is wrong with an answer, and what helps."""
    return [*wrap(f"{given}: no, {one.judge(given)}.", "   ", "   ")]
