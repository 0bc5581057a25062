"""Makes the tables of docs/invariants.md anew: ``.venv/bin/python tests/invariants/make_doc.py``."""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DOC = ROOT / "docs" / "invariants.md"
AGAIN = "make it anew: .venv/bin/python tests/invariants/make_doc.py"


def table(caught):
    """The faults as a Markdown table."""
    lines = [
        "| fault | what is done to the engine | scenario | caught by | at the first event |",
        "|---|---|---|---|---|",
    ]
    for one in caught:
        step = one.violation.step if one.violation else None
        where = f"`{one.kind}` of step {step}" if one.kind else "**not caught**"
        lines.append(
            f"| {one.fault.id} | {one.fault.does} | {one.fault.scenario} "
            f"| `{one.fault.invariant}` | {where} |"
        )
    return "\n".join(lines)


def rules_table():
    """The invariants as a Markdown table."""
    from vllm_trace.invariants.registry import choose

    lines = ["| id | what holds | vLLM | needs | fails when |", "|---|---|---|---|---|"]
    for one in choose():
        if one.built_in:
            lines.append(
                f"| `{one.id}` | {one.sentence} {one.doc} | {one.releases or 'any'} "
                f"| {', '.join(one.needs) or '–'} | {one.mutation} |"
            )
    return "\n".join(lines)


def fill(text, **tables):
    """The document with these tables between their marks."""
    for mark, made in tables.items():
        begin, end = f"<!-- {mark} -->\n", f"\n<!-- /{mark} -->"
        text = text[: text.index(begin) + len(begin)] + made + text[text.index(end) :]
    return text


def main():
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    sys.path.insert(0, str(ROOT / "tests"))
    from invariants import fault_runs, faults, mini_faults

    caught = []
    with tempfile.TemporaryDirectory() as folder:
        for one in faults.FAULTS:
            caught.append(fault_runs.run(one, Path(folder) / one.id))
            seen = caught[-1]
            also = [v.invariant for v in seen.report.violations if v.invariant != one.invariant]
            said = seen.violation.message if seen.violation else f"NOT by it, but by {also}"
            print(f"{one.id}: {seen.kind} +{seen.steps_late} {said}", file=sys.stderr)
    made = {"rules": rules_table(), "faults": table(caught), "mini-faults": mini_faults.table()}
    DOC.write_text(fill(DOC.read_text(), **made))
    print(f"{DOC.relative_to(ROOT)}: {len(caught)} faults", file=sys.stderr)


if __name__ == "__main__":
    main()
