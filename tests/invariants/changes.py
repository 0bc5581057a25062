"""Golden traces, and changes of one event that an invariant must find: each says where, and which one."""

import copy
from pathlib import Path

from vllm_trace.events import (
    AttentionPlanned,
    SlotsMapped,
)
from vllm_trace.invariants import EventList, check
from vllm_trace.invariants.registry import choose
from vllm_trace.tracefile import TraceFile

GOLD = Path(__file__).parent.parent / "gold"
BUILT_IN = [one.id for one in choose() if one.built_in]


def gold(name):
    """(header, events) of a golden trace, fresh."""
    file = TraceFile(GOLD / f"{name}.vtrace")
    return file.header, list(file.events())


def judged(events, header=None, only=BUILT_IN, also=(), problems=()):
    return check(EventList(events, header or {"vllm": "0.32.0"}, problems), only, also)


def found(report):
    return {v.invariant: v.event_number for v in report.violations}


def first(events, kind, where=lambda event: True):
    """Index of the first event of a kind."""
    return next(i for i, e in enumerate(events) if e.kind == kind and where(e))


def flip_variant(events):
    at = first(events, "attention.planned")
    events[at].variant = events[at].variant.replace("whole", "split-kv")
    return at, "kernel-variant"


def triton_against_its_rule(events):
    at = first(events, "attention.planned")
    numbers = {"max_query_len": 1, "num_seqs": 3, "seq_threshold_3D": 16}
    batch = SlotsMapped(events[at].step, 9, 32, 32, [], [], [], [])
    events[at] = AttentionPlanned(batch.step, 9, "unified_attention", "2D", numbers)
    return at, "kernel-variant"


def paged_attention_of(events, variant, **numbers):
    """As our backend tells it: of the decoding requests of the first batch that mixes them with others."""
    at = first(events, "slots.mapped", lambda e: 1 in e.query_lens and max(e.query_lens) > 1)
    batch = events[at]
    lens = [s for q, s in zip(batch.query_lens, batch.seq_lens, strict=True) if q == 1]
    numbers = {"max_seq_len": max(lens), "num_seqs": len(lens), "num_heads": 4} | numbers
    events.insert(
        at + 1,
        AttentionPlanned(batch.step, batch.group, "paged_attention_v1", variant, numbers, [0]),
    )
    return at + 1, "kernel-variant"


def v2_for_one_partition(events):
    return paged_attention_of(events, "V2")


def v1_for_a_shorter_batch(events):
    return paged_attention_of(events, "V1", max_seq_len=1)


def v1_for_fewer_requests(events):
    return paged_attention_of(events, "V1", num_seqs=0)


def too_many_requests(events):
    at = first(events, "engine.configured")
    events[at].settings["max_num_seqs"] = 2
    return first(events, "step.scheduled"), "token-budget"


def longer_than_the_model(events):
    events[first(events, "engine.configured")].settings["max_model_len"] = 100
    end = next(i for i, e in enumerate(events) if e.kind == "slots.mapped" and 101 in e.seq_lens)
    at = max(i for i in range(end) if events[i].kind == "step.scheduled")
    return at, "token-budget"


def hash_of_another_place(events):
    at = first(events, "blocks.cached", lambda e: e.first == 0)
    events[at].hashes[0] ^= 1
    return at, "hash-chain"


def other_hash_at_the_next_lookup(events):
    at = first(events, "prefix.looked_up", lambda e: e.new_hashes)
    events[at].new_hashes[0] ^= 1
    return at, "hash-chain"


def hit_as_long_as_the_request(events):
    at = first(events, "prefix.looked_up", lambda e: e.num_hit_tokens)
    events[at].num_tokens = events[at].num_hit_tokens
    return at, "hash-chain"


def null_block_in_a_table(events):
    at = first(events, "slots.allocated", lambda e: len(e.blocks[0]) > 1)
    events[at].blocks[0][0] = 0
    return at, "null-block"


def null_block_written(events):
    at = first(events, "slots.mapped")
    events[at].slots[0] = 5
    return at, "null-block"


def row_shorter_than_before(events):
    later = first(events, "step.scheduled", lambda e: e.step == 3)
    at = first(events, "slots.mapped", lambda e: e.step == 3)
    assert later < at
    row = copy.copy(events[first(events, "table.changed")])
    row.step, row.first, row.blocks = 3, 1, []
    events.insert(at, row)
    return at, "tables-grow"


def hits_in_front_of_a_running_request(events):
    at = first(events, "slots.allocated", lambda e: e.num_new_tokens == 1)
    events[at].hit_blocks, events[at].num_hit_tokens = [[7]], 32
    return at, "tables-grow"


def a_request_nobody_planned(events):
    at = first(events, "slots.mapped")
    events[at].requests = [*events[at].requests[:-1], 77]
    return at, "positions-advance"


def a_request_left_out(events):
    at = first(events, "slots.mapped", lambda e: len(e.requests) > 1 and e.step > 1)
    event = events[at]
    cut = sum(event.query_lens[:-1])
    event.slots = event.slots[:cut]
    event.requests, event.query_lens = event.requests[:-1], event.query_lens[:-1]
    event.seq_lens = event.seq_lens[:-1]
    return at, "positions-advance"


def a_slot_too_few(events):
    at = first(events, "slots.mapped", lambda e: e.step == 2)
    events[at].slots = events[at].slots[:-1]
    return at, "slot-mapping"


def a_slot_in_the_middle_of_a_prompt(events):
    at = first(events, "slots.mapped")
    events[at].slots[7] += 1
    return at, "slot-mapping"


def the_worker_is_told_of_one_block_less(events):
    at = first(events, "table.changed", lambda e: len(e.blocks) > 1)
    events[at].blocks = events[at].blocks[:-1]
    return first(events, "slots.mapped"), "worker-table"


def a_free_is_lost(events):
    at = first(events, "blocks.freed")
    del events[at]
    return first(events, "request.freed"), "nothing-held"


def a_count_that_is_one_too_high(events):
    at = first(events, "blocks.freed")
    events[at].ref_cnts = [n + 1 for n in events[at].ref_cnts]
    return at, "ref-counts"


def a_refusal_is_lost(events):
    at = first(events, "request.preempted")
    refused = max(i for i in range(at) if events[i].kind == "slots.refused")
    del events[refused]
    return at - 1, "preempt-needed"


def a_block_taken_twice(events):
    at, again = [i for i, e in enumerate(events) if e.kind == "blocks.taken"][:2]
    events[again].blocks = list(events[at].blocks)
    return again, "single-owner"


def a_stale_hash(events):
    at = first(events, "block.evicted")
    del events[at]
    return first(events[at:], "blocks.taken") + at, "hit-cached"
