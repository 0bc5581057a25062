"""The schema: what is on disk keeps its place, and every event has a name of its own."""

import msgspec

from vllm_trace import events
from vllm_trace.events import EVENT_TYPES, KINDS, SCHEMA_VERSION, AnyEvent, BlocksTaken, to_dict

#: Fields in the order of the file, for every tag. New ones go to the end of a line, with a default;
#: anything else needs a new tag or a new SCHEMA_VERSION, because files like these exist.
FIELDS = {
    1: "engine.configured: at_ns block_size hash_block_size num_blocks groups settings",
    2: "request.arrived: request at_ns request_id num_prompt_tokens max_tokens priority arrival_unix "
    "block_hashes sampling lora salted traceparent token_ids",
    3: "request.finished: request at_ns reason num_output_tokens num_preemptions",
    4: "request.preempted: request num_computed_tokens num_free_blocks",
    5: "request.freed: request",
    6: "prefix.looked_up: request num_tokens num_hit_tokens blocks new_hashes",
    7: "slots.allocated: request num_new_tokens num_hit_tokens blocks hit_blocks num_free_blocks num_kept",
    9: "slots.refused: request num_new_tokens num_hit_tokens num_free_blocks num_kept num_wanted_blocks",
    10: "blocks.taken: blocks",
    11: "block.evicted: block hashes",
    12: "blocks.touched: blocks ref_cnts",
    13: "blocks.cached: request group first blocks hashes",
    14: "blocks.freed: blocks ref_cnts",
    15: "prefix.reset: ok",
    16: "step.scheduled: step started_ns dur_ns num_running num_waiting num_free_blocks num_kept "
    "requests num_tokens new resumed preempted finished num_spec_tokens kept",
    17: "step.updated: step started_ns dur_ns num_output_tokens token_ids",
    18: "step.executed: step started_ns dur_ns forward_ns forward_dur_ns rank num_tokens num_tokens_padded mode "
    "device_dur_ns",
    19: "table.changed: step group request first blocks",
    20: "slots.mapped: step group block_size kernel_block_size requests query_lens seq_lens slots",
    21: "attention.planned: step group kernel variant numbers layers reason",
    22: "attention.called: step kernel layers started_ns dur_ns clock worst tolerance beyond",
    23: "backend.selected: layer backend impl candidates settings",
    24: "probe.failed: hook error",
    25: "request.seen: request request_id",
    26: "kv_events.taken: events",
    27: "engine.stopped: at_ns",
    28: "step.sampled: step started_ns dur_ns rank",
}
#: Tags that were given up; they never come back with another meaning.
GONE = {8}


def described(cls):
    return f"{cls.kind}: {' '.join(cls.__struct_fields__)}"


def test_a_field_keeps_its_place_in_the_file():
    now = {cls.__struct_config__.tag: described(cls) for cls in EVENT_TYPES}
    moved = {tag for tag, line in FIELDS.items() if not now.get(tag, "").startswith(line)}
    assert set() == moved, "fields were moved, renamed or taken out: readers of older files break"
    assert FIELDS == now, "new fields or events: add them to FIELDS"


def test_every_event_has_a_tag_and_a_kind_of_its_own():
    tags = [cls.__struct_config__.tag for cls in EVENT_TYPES]
    kinds = [cls.kind for cls in EVENT_TYPES]
    assert sorted(set(tags)) == sorted(tags)
    assert sorted(set(kinds)) == sorted(kinds)
    assert set() == GONE & set(tags)
    assert all(kind.count(".") == 1 for kind in kinds)
    assert {cls.kind: cls for cls in EVENT_TYPES} == KINDS


def test_every_event_of_the_module_can_be_in_a_trace():
    made = {
        cls
        for cls in vars(events).values()
        if isinstance(cls, type) and issubclass(cls, events.Event)
    }
    assert made - {events.Event} == set(EVENT_TYPES)


def test_what_an_older_writer_left_out_at_the_end_is_the_default():
    whole = msgspec.to_builtins(events.AttentionCalled(3, "flash", [0], [5], [7], "cuda"))
    assert [22, 3, "flash", [0], [5], [7], "cuda", [], 0.0, {}] == whole
    older = msgspec.msgpack.encode([whole[:-4]])
    assert [events.AttentionCalled(3, "flash", [0], [5], [7])] == msgspec.msgpack.decode(
        older, type=list[AnyEvent]
    )


def test_what_a_newer_writer_of_the_same_schema_added_at_the_end_is_skipped():
    newer = msgspec.msgpack.encode([[10, [1, 2], "new field"], [5, 4]])
    assert [BlocksTaken([1, 2]), events.RequestFreed(4)] == msgspec.msgpack.decode(
        newer, type=list[AnyEvent]
    )


def test_a_dict_names_the_kind_first_and_holds_only_plain_values():
    group = events.KVGroup("FullAttentionSpec", 16, ["layers.0"], page_size_bytes=4096)
    made = to_dict(events.EngineConfigured(9, 16, 16, 40, [group], {"policy": "fcfs"}))
    assert "kind" == next(iter(made))
    assert {
        "kind": "engine.configured",
        "at_ns": 9,
        "block_size": 16,
        "hash_block_size": 16,
        "num_blocks": 40,
        "groups": [
            {
                "kind": "FullAttentionSpec",
                "block_size": 16,
                "layers": ["layers.0"],
                "sliding_window": 0,
                "page_size_bytes": 4096,
            }
        ],
        "settings": {"policy": "fcfs"},
    } == made


def test_the_schema_number_stands_in_the_history():
    history = events.__doc__.partition("Schema history")[2].partition("\n\n")[0]
    numbers = [int(line.split()[0]) for line in history.splitlines()[1:] if line.split()]
    assert SCHEMA_VERSION == numbers[-1]
    assert [*range(1, SCHEMA_VERSION + 1)] == numbers
