"""``explain``: the life of one request, on traces of a real engine."""

import json

import pytest
from recorded import needs_vllm, recorded, story, told

from vllm_trace.cli import main
from vllm_trace.events import BlockEvicted
from vllm_trace.explain import render
from vllm_trace.summary import Summary
from vllm_trace.trace import read_trace


def facts(folder, name, kind):
    return [line.facts for line in story(folder, name).lines if line.kind == kind]


@needs_vllm
def test_preempted_request_waits_is_resumed_and_tells_what_it_cost():
    assert [
        "arrived, behind r-0 and r-1",
        "prefix cache: 0 of 1 block hit; nobody had cached its first block (tokens 0–31)",
        "got 5 6 (logical 0–1); 2 left free",
        "step 1: computed the whole prompt, tokens 0–59",
        "steps 2–5: decoded 4 tokens",
        "preempted: it needed 1 block (refused at event N, 0 free) and was itself the one to give "
        "way; 64 computed tokens given up; gave back 6 5 (event N)",
        "prefix cache: 2 of 2 blocks hit: 5 6 (64 of 65 tokens)",
        "steps 7–37: waited; the pool refused it 31 times (up to event N): 3 blocks wanted, "
        "2 of them its hits, which lie in the free queue; 2 free",
        "next owner: r-0 took 6, evicting what it had cached there",
        "next owner: r-1 took 5, evicting what it had cached there",
        "prefix cache: 0 of 2 blocks hit; block 0 (tokens 0–31), cached by r-2 in block 5 "
        "(event N), was evicted at event N when r-1 took that block",
        "steps 38–60: waited; the pool refused it 23 times (up to event N): 3 blocks wanted; 0 free",
        "got 5–7 (logical 0–2); 5 left free",
        "step 61: back in the batch, 55 steps after its preemption; of the 64 tokens given up, "
        "none came back from the prefix cache and 64 are computed again",
        "step 61: computed tokens 0–64 again",
        "steps 62–115: decoded 54 tokens; new on the way: 2 (logical 3, event N)",
        "finished (length) with 60 tokens generated, preempted once; its table was 5–7 2; "
        "gave back 2 7 6 5 (event N)",
        "nobody got 2 5–7 in the rest of the trace",
    ] == told(recorded("preempt", tokens=True), "r-2")


@needs_vllm
def test_evicted_prefix_names_who_took_the_block_and_when():
    folder = recorded("evict")
    assert [
        "arrived, nobody waits before it",
        "prefix cache: 3 of 5 blocks hit: 1–3 (96 of 170 tokens); block 3 (tokens 96–127), "
        "cached by A in block 4 (event N), was evicted at event N when B took that block",
        "took over 1–3 from the prefix cache and got 4 5 11 (logical 3–5); 5 left free",
        "step 9: computed the rest of the prompt, tokens 96–169",
        "steps 10–12: decoded 3 tokens",
        "finished (length) with 4 tokens generated; its table was 1–5 11; "
        "gave back 11 5 4 3 2 1 (event N)",
        "nobody got 1–5 11 in the rest of the trace",
    ] == told(folder, "A-again")
    records = {record.number: record.event for record in read_trace(folder).records()}
    (lookup,) = facts(folder, "A-again", "looked up")
    evicted = records[lookup["miss"]["lost_event"]]
    assert isinstance(evicted, BlockEvicted) and evicted.block == 4
    assert 4 in records[lookup["miss"]["cached_event"]].blocks
    assert [
        "next owner: B took 6 5 4, evicting what it had cached in 5 4",
        "next owner: A-again hit 1–3, still cached",
    ] == told(folder, "A")[-2:]


@needs_vllm
def test_hits_at_the_edge_of_a_block():
    folder = recorded("boundary")
    said = {name: told(folder, name)[1] for name in ("even-again", "one-over", "short-second")}
    assert {
        "even-again": "prefix cache: 1 of 2 blocks hit: 1 (32 of 64 tokens); block 1 (tokens 32–63) "
        "is computed in any case: the last token has to run for its logits, and hits come in "
        "whole blocks",
        "one-over": "prefix cache: 2 of 2 blocks hit: 1 2 (64 of 65 tokens)",
        "short-second": "prefix cache: 1 of 2 blocks hit: 4 (32 of 84 tokens); nobody had cached a "
        "block that goes on like its block 1 (tokens 32–63)",
    } == said
    assert "step 3: decoded 1 token; new on the way: 4 (logical 2, event N)" in told(
        folder, "even-again"
    )


@needs_vllm
def test_shared_blocks_stay_with_the_others():
    said = told(recorded("prefix"), "user-1")
    assert "arrived, behind user-0" == said[0]
    assert "prefix cache: 5 of 5 blocks hit: 1–5 (160 of 186 tokens)" == said[1]
    assert "took over 1–5 from the prefix cache and got 7 (logical 5); 392 left free" == said[2]
    finish = next(line for line in said if line.startswith("finished"))
    assert "; 5 4 3 2 1 stay with user-2, user-3 and " in finish


@needs_vllm
def test_aborted_requests_and_the_one_that_takes_their_place():
    folder = recorded("abort")
    assert [
        "arrived, behind stays and leaves",
        "finished (abort) while it waited: it never ran",
    ] == told(folder, "never-ran")
    assert (
        "finished (abort) with 5 tokens generated; its table was 3 4; gave back 4 3 (event N)"
        in (told(folder, "leaves"))
    )
    assert (
        "steps 1–5: waited; no place in the batch, which is full with 2 (max_num_seqs)"
        == (told(folder, "last")[1])
    )


@needs_vllm
def test_chunks_of_a_prefill_and_what_cut_them():
    said = told(recorded("chunked"), "long")
    assert [
        "step 4: chunk 1 of 3: tokens 0–62; that spent the step's budget",
        "step 5: chunk 2 of 3: tokens 63–125; got 5 6; that spent the step's budget",
        "step 6: chunk 3 of 3: tokens 126–149; got 7",
        "steps 7–13: decoded 7 tokens",
    ] == said[3:7]


@needs_vllm
def test_light_level_says_what_it_cannot_know():
    made = story(recorded("preempt", level="light"), "r-2")
    texts = [line.text for line in made.lines]
    assert "preempted; for whom is not recorded; 64 computed tokens given up" in texts
    assert "steps 7–60: waited with 0–2 free; level light does not record why" in texts
    assert not any("prefix cache: " in text for text in texts)
    assert made.unknown == [
        "level light: prefix lookups, refusals and blocks are not recorded; "
        "why it waited, what it hit and held, and for whom it was preempted cannot be told"
    ]


EVENT_OF = {
    "arrived": "request.arrived",
    "looked up": "prefix.looked_up",
    "got": "slots.allocated",
    "computed": "step.scheduled",
    "decoded": "step.scheduled",
    "resumed": "step.scheduled",
    "preempted": "request.preempted",
    "made room": "slots.refused",
    "passed on": "slots.allocated",
    "finished": "request.finished",
}


@needs_vllm
@pytest.mark.parametrize("name", ["preempt", "evict", "boundary", "batch", "abort", "mixed"])
def test_every_story_agrees_with_the_summary_and_fits_the_terminal(name):
    folder = recorded(name, tokens=name == "preempt")
    trace = read_trace(folder)
    summary = Summary.of(trace)
    kinds = {record.number: record.event.kind for record in trace.records()}
    lives = summary.requests if len(summary.requests) < 10 else summary.requests[::17]
    lives += [life for life in summary.requests if life.num_preemptions][:5]
    for life in lives:
        made = story(folder, life.name)
        assert all(len(line) <= 80 for line in render(made).splitlines())
        assert [] == made.unknown
        by_kind = {}
        for line in made.lines:
            by_kind.setdefault(line.kind, []).append(line)
            if line.kind in EVENT_OF:
                assert EVENT_OF[line.kind] == kinds[line.event], line
        numbers = [line.event for line in made.lines if line.event]
        assert sorted(numbers) == numbers
        assert life.num_preemptions == len(by_kind.get("preempted", ()))
        (finish,) = by_kind["finished"]
        assert (life.reason, life.num_output_tokens) == (
            finish.facts["reason"],
            finish.facts["num_output_tokens"],
        )
        if not life.num_steps:
            continue
        chunks = [chunk for line in by_kind["computed"] for chunk in line.facts["chunks"]]
        decodes = sum(
            line.facts["steps"][1] - line.facts["steps"][0] + 1
            for line in by_kind.get("decoded", ())
        )
        assert life.num_steps == len(chunks) + decodes
        hits = [sum(map(len, line.facts["hit_blocks"])) for line in by_kind["got"]]
        assert life.num_hit_tokens == hits[0] * 32
        again = sum(line.facts.get("num_hit_tokens", 0) for line in by_kind.get("resumed", ()))
        assert life.num_resume_hit_tokens == again
        assert life.table == finish.facts["table"] or life.num_preemptions


@needs_vllm
def test_no_cause_is_open_on_a_busy_engine():
    """Of every lookup and every wait of 200 requests the reason is found."""
    folder = recorded("mixed")
    names = [life.name for life in Summary.of(read_trace(folder)).requests]
    causes, reasons = set(), set()
    for name in names[::9]:
        causes |= {one["miss"]["cause"] for one in facts(folder, name, "looked up")}
        reasons |= {one["reason"] for one in facts(folder, name, "waited")}
        for wait in facts(folder, name, "waited"):
            if wait["reason"] == "refused":
                assert wait["wanted"] > wait["free"][1]
    assert causes <= {"all hit", "none shared", "evicted", "logits", "short"}
    assert reasons <= {"refused", "behind", "budget", "preempting", "full"}


@needs_vllm
def test_verb(capsys):
    folder = str(recorded("preempt", tokens=True))
    assert 0 == main(["explain", folder, "r-2", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert (1, "r-2", 2) == (document["schema"], document["request"], document["number"])
    assert {"arrived", "preempted", "finished"} <= {line["kind"] for line in document["lines"]}
    assert 0 == main(["explain", folder, "#1"])
    assert capsys.readouterr().out.startswith("r-1\n  60 prompt tokens, up to 60 to generate\n")
    assert 2 == main(["explain", folder, "q-2"])
    assert "unknown request 'q-2'; did you mean 'r-2'?" in capsys.readouterr().err
