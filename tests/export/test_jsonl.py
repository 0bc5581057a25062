"""JSON lines: every event, whole, in order."""

import json
from pathlib import Path

import pytest
from helpers import run_cli
from recorded import arrived, engine, updated, written

from vllm_trace.events import to_dict
from vllm_trace.export import ExportOptions, export
from vllm_trace.trace import read_trace

GOLD = Path(__file__).parent.parent / "gold"


def lines(path, folder, **options):
    made = folder / "made.jsonl"
    export(read_trace(path), "json", str(made), ExportOptions(**options))
    return [json.loads(line) for line in made.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLD.glob("*.vtrace")))
def test_a_line_is_an_event(name, tmp_path):
    wanted = [
        {"number": r.number, "process": r.process} | to_dict(r.event)
        for r in read_trace(GOLD / f"{name}.vtrace").records()
    ]
    assert json.loads(json.dumps(wanted)) == lines(GOLD / f"{name}.vtrace", tmp_path)


def test_hashes_are_whole_numbers(tmp_path):
    found = lines(GOLD / "mixed.vtrace", tmp_path)
    hashes = [h for line in found for h in line.get("block_hashes", ())]
    assert max(hashes) > 2**63 and all(type(one) is int for one in hashes)


def test_token_ids_leave_only_when_they_are_asked_for(tmp_path):
    events = [engine(), arrived(0, "r-0", 3, token_ids=[7, 8, 9]), updated(1, [[5]])]
    written(tmp_path / "trace", events, tokens=True)
    kept = [line.get("token_ids") for line in lines(tmp_path / "trace", tmp_path)]
    assert [None, None, None] == kept
    asked = [line.get("token_ids") for line in lines(tmp_path / "trace", tmp_path, tokens=True)]
    assert [None, [7, 8, 9], [[5]]] == asked


def test_a_trace_that_is_not_whole_says_so_in_its_last_line(tmp_path):
    written(tmp_path / "trace", [engine()], dropped=2)
    *_, event, last = lines(tmp_path / "trace", tmp_path)
    assert "engine.configured" == event["kind"]
    assert {"kind": "trace.incomplete", "problems": ["main-7: 2 events were dropped"]} == last


def test_the_command_writes_to_stdout(tmp_path):
    done = run_cli("export", GOLD / "hello.vtrace", "--to", "json", "-o", "-", cwd=tmp_path)
    assert 0 == done.returncode
    assert (
        151
        == len(done.stdout.splitlines())
        == sum(1 for _ in map(json.loads, done.stdout.splitlines()))
    )
