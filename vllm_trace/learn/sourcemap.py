"""``docs/source-map.md`` and ``places.json``: every reference of the seeds, in every known release.

``vllm-trace learn sources`` prints the map for the vLLM that is there. For maintainers::

    vllm-trace learn sources --source ./vllm-0.11.2 --source ./vllm-0.33.0 --save

reads unpacked sources (wheels have the Python, source distributions the CUDA too), writes
``places.json`` into the package and the page into ``docs/``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_trace.errors import UsageError
from vllm_trace.learn.passages import Passage, Reference, Tree, known, references

PLACES = Path(__file__).with_name("places.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "source-map.md"
HEAD = """\
# Where the plan's references are now

The learning plan, the deep dive and the engine-step notes point at vLLM's source by file and line. This table has
every one of them in each release that was looked at ({releases}), and some that
`learn` needs besides. Lines are of the definition; `→` marks what does the work of something that is gone; `–` is
nothing. The plan describes 0.11.2, the deep dive 0.6.3 or thereabouts.

{stated}

Made by `vllm-trace learn sources --source DIR --save`; `vllm-trace learn sources` prints it for the vLLM that is
installed.

"""
DOCUMENTS = {
    "plan": "learning plan",
    "deep dive": "deep dive",
    "notes": "engine-step notes",
    "ours": "none: added here",
}


def survey(tree: Tree) -> dict[str, list[Any]]:
    """Reference → place, for all that are found in a source."""
    made = {}
    for reference in references():
        found = tree.find(reference)
        if found is not None:
            made[reference.id] = found.to_list()
    return made


def save(trees: Iterable[Tree]) -> list[Path]:
    """Write what was found in these sources over what is known, then the page.

    Raises: ``UsageError`` when this package is installed and no checkout.
    """
    if not (PAGE.parents[1] / "pyproject.toml").is_file():
        raise UsageError("--save is for a checkout of vllm_trace: there is no docs/ here")
    places = dict(known())
    for tree in trees:
        places[tree.release] = survey(tree)
    ordered = dict(sorted(places.items(), key=lambda item: _number(item[0])))
    lines = []
    for release, found in ordered.items():
        rows = ",\n".join(f"  {json.dumps(id)}: {json.dumps(at)}" for id, at in found.items())
        lines.append(f" {json.dumps(release)}: {{\n{rows}\n }}")
    PLACES.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    known.cache_clear()
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    return [PLACES, PAGE]


def page() -> str:
    """The whole of ``docs/source-map.md``."""
    releases = list(known())
    head = HEAD.format(releases=", ".join(releases), stated=_stated())
    rows = ["| reference | document | said | " + " | ".join(releases) + " | what became of it |"]
    rows.append("|---|---|---|" + "---|" * len(releases) + "---|")
    for one in references():
        said = f"`{one.said}`" + (f" {one.lines}" if one.lines else "") if one.said else "–"
        cells = [_cell(known()[release].get(one.id)) for release in releases]
        rows.append(
            f"| {one.id} | {DOCUMENTS[one.seed]} | {said} | "
            + " | ".join(cells)
            + f" | {one.fate}: {one.became} |"
        )
    files = ["", "## Files", "", "| reference | release | file | name |", "|---|---|---|---|"]
    for one in references():
        if one.inside:
            continue  # where its function is
        for release, at in _changes(one, releases):
            files.append(
                f"| {one.id} | {release} | `{at.file}`{' (its work)' if at.successor else ''} | "
                f"{_name(at.name)} |"
            )
    return head + "\n".join(rows + files) + "\n"


def _stated() -> str:
    """What the documents' own line numbers are worth, counted."""
    right, off = 0, []
    for one in references():
        place = known().get(one.release, {}).get(one.id)
        if not one.lines or place is None:
            continue
        first, line = int(one.lines.partition("-")[0]), place[2]
        right += line == first
        if line == first + 1:
            off.append(f"`{one.id}` at a decorator, one line above")
        elif line != first:
            off.append(f"`{one.id}` at {first}, and it begins at {line}")
    total = right + len(off)
    return (
        f"Of {total} places that the plan gives by line, {right} begin exactly there in 0.11.2; of the "
        f"others the plan has\n{'; '.join(off)}."
    )


def _changes(one: Reference, releases: list[str]) -> list[tuple[str, Passage]]:
    """The releases in which the address is another than before."""
    made: list[tuple[str, Passage]] = []
    for release in releases:
        place = known()[release].get(one.id)
        at = None if place is None else Passage(*place)
        if at and (not made or (made[-1][1].file, made[-1][1].name) != (at.file, at.name)):
            made.append((release, at))
    return made


def _cell(place: list[Any] | None) -> str:
    if place is None:
        return "–"
    at = Passage(*place)
    lines = (
        "folder" if not at.line else f"{at.line}" if at.line == at.end else f"{at.line}–{at.end}"
    )
    return ("→ " if at.successor else "") + lines


def _name(name: str) -> str:
    return f"`{name.removeprefix('text:')}`" if name else "the whole"


def _number(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".") if part.isdigit())
