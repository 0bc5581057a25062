"""Arbitrary events for hypothesis, made from the fields of the schema itself."""

from __future__ import annotations

from typing import Any, get_args, get_origin, get_type_hints

import msgspec
from hypothesis import strategies as st

from vllm_trace.events import EVENT_TYPES, Event, StepScheduled
from vllm_trace.whole import MAX_BLOCKS

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
integers = st.integers(-(2**63), 2**64 - 1)
plain = st.none() | st.booleans() | integers | st.floats(allow_nan=False) | text


def of_type(hint: Any) -> st.SearchStrategy[Any]:
    """Values of an annotated type that MessagePack can hold."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is list:
        return st.lists(of_type(inside[0]), max_size=4)
    if origin is tuple:
        return st.tuples(*map(of_type, inside))
    if origin is dict:
        return st.dictionaries(of_type(inside[0]), of_type(inside[1]), max_size=3)
    if inside:
        return st.one_of(*map(of_type, inside))
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return of_struct(hint)
    known = {int: integers, str: text, bool: st.booleans(), float: st.floats(allow_nan=False)}
    return known[hint] if hint in known else {Any: plain, type(None): st.none()}[hint]


def of_struct(cls: type[Any]) -> st.SearchStrategy[Any]:
    hints = get_type_hints(cls)
    fields = {name: of_type(hints[name]) for name in cls.__struct_fields__}
    if "num_kept" in fields:
        fields["num_kept"] = st.integers(0, 2**64 - 1)  # below 0 a reader works it out
    for name in fields.keys() & {"block_size", "hash_block_size", "num_blocks"}:
        fields[name] = st.integers(1, MAX_BLOCKS)  # of others a reader says that they are damage
    return st.builds(cls, **fields)


events = st.sampled_from(EVENT_TYPES).flatmap(of_struct)
batches = st.lists(st.lists(events, min_size=1, max_size=6), max_size=8)


def as_read(batches: list[list[Event]]) -> list[Event]:
    """The same events with each step's composition spelled out, as a reader gives them."""
    requests: list[int] = []
    num_tokens: list[int] = []
    whole = []
    for event in [event for batch in batches for event in batch]:
        if isinstance(event, StepScheduled):
            requests = requests if event.requests is None else event.requests
            num_tokens = num_tokens if event.num_tokens is None else event.num_tokens
            event = msgspec.structs.replace(event, requests=requests, num_tokens=num_tokens)
        whole.append(event)
    return whole
