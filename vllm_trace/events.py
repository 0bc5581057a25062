"""Every event that a trace can hold: past-tense facts with vLLM's names.

Schema history (``SCHEMA_VERSION``):
  1  first.

On disk an event is a MessagePack array ``[tag, field, …]``. A tag is never used again and new
fields go to the end with a default, so an older reader still reads a file of the same version.

Conventions: ``request`` is a small number local to a trace; ``request.arrived`` (or
``request.seen`` in a worker) gives its name. A *block list per group* is ``[[id, …], …]``, one
list for each KV-cache group. ``*_ns`` is the monotonic clock of the host, the same for all its
processes. Hashes are the low 64 bits of vLLM's block hash, as vLLM's own KV events print them.
Facts of a call come in the order of return: what happened inside ``allocate_slots`` stands
before ``slots.allocated``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Union, get_args

import msgspec

SCHEMA_VERSION = 1

BlockIds = list[list[int]]


class Event(msgspec.Struct, array_like=True, gc=False):
    """A fact. ``kind`` is its name in text, JSON and SQL."""

    kind: ClassVar[str] = ""


class KVGroup(msgspec.Struct):
    """One KV-cache group: layers that share block tables."""

    kind: str
    block_size: int
    """Tokens in one block of the manager."""
    layers: list[str]
    sliding_window: int = 0
    """Tokens; 0 means none."""
    page_size_bytes: int = 0


class EngineConfigured(Event, tag=1):
    """A scheduler with its KV-cache manager was made; block ids start afresh."""

    kind: ClassVar[str] = "engine.configured"
    at_ns: int
    block_size: int
    """Tokens in a block as the scheduler counts them."""
    hash_block_size: int
    num_blocks: int
    """Blocks in the pool, the null block included."""
    groups: list[KVGroup]
    settings: dict[str, Any]
    """Model, limits and policy; see ``patches/scheduler_probes.py``."""


class RequestArrived(Event, tag=2):
    """``Scheduler.add_request``: the request is in the waiting queue."""

    kind: ClassVar[str] = "request.arrived"
    request: int
    at_ns: int
    request_id: str
    num_prompt_tokens: int
    max_tokens: int
    priority: int
    arrival_unix: float
    """Seconds since 1970, when the front end took it."""
    block_hashes: list[int]
    sampling: dict[str, Any]
    lora: str | None = None
    salted: bool = False
    traceparent: str | None = None
    token_ids: list[int] | None = None
    """Only with ``--tokens``."""


class RequestFinished(Event, tag=3):
    """The request left the scheduler; ``reason`` is vLLM's (stop, length, abort, …)."""

    kind: ClassVar[str] = "request.finished"
    request: int
    at_ns: int
    reason: str
    num_output_tokens: int
    num_preemptions: int


class RequestPreempted(Event, tag=4):
    """Blocks taken back; the request waits again and will recompute."""

    kind: ClassVar[str] = "request.preempted"
    request: int
    num_computed_tokens: int
    """Tokens whose KV was given up."""
    num_free_blocks: int


class RequestFreed(Event, tag=5):
    """``KVCacheManager.free`` returned; its blocks stand in the ``blocks.freed`` before."""

    kind: ClassVar[str] = "request.freed"
    request: int


class PrefixLookedUp(Event, tag=6):
    """``get_computed_blocks``: what the prefix cache had for a request."""

    kind: ClassVar[str] = "prefix.looked_up"
    request: int
    num_tokens: int
    num_hit_tokens: int
    blocks: BlockIds
    new_hashes: list[int]
    """Block hashes of the request that no earlier event of it carried."""


class SlotsAllocated(Event, tag=7):
    """``allocate_slots`` succeeded and the request's table grew."""

    kind: ClassVar[str] = "slots.allocated"
    request: int
    num_new_tokens: int
    num_hit_tokens: int
    blocks: BlockIds
    """New blocks only; hits stand in ``hit_blocks``."""
    hit_blocks: BlockIds
    num_free_blocks: int
    num_kept: int = 0
    """Calls in this step before this one that needed no block and left no event. On disk -1 stands
    for "see the step's composition", here, in ``slots.refused`` and in ``step.scheduled``."""


class SlotsRefused(Event, tag=9):
    """``allocate_slots`` returned None; or, in 0.20, ``can_fit_full_sequence`` said no to a waiting request."""

    kind: ClassVar[str] = "slots.refused"
    request: int
    num_new_tokens: int
    num_hit_tokens: int
    num_free_blocks: int
    num_kept: int = 0
    num_wanted_blocks: int = 0
    """Free blocks that the call needed: new ones, hits that lie in the free queue, and what must stay
    free beside them (watermark, reserve). 0 where it is not known."""


class BlocksTaken(Event, tag=10):
    """Popped from the head of the free queue, in this order."""

    kind: ClassVar[str] = "blocks.taken"
    blocks: list[int]


class BlockEvicted(Event, tag=11):
    """A block lost its place in the prefix cache."""

    kind: ClassVar[str] = "block.evicted"
    block: int
    hashes: list[int]


class BlocksTouched(Event, tag=12):
    """Reference counts went up by one; those at zero left the free queue."""

    kind: ClassVar[str] = "blocks.touched"
    blocks: list[int]
    ref_cnts: list[int]
    """After the touch."""


class BlocksCached(Event, tag=13):
    """Full blocks got their hash and can be hit from now on."""

    kind: ClassVar[str] = "blocks.cached"
    request: int
    group: int
    first: int
    """Position in the request's table of the first block looked at."""
    blocks: list[int]
    hashes: list[int]


class BlocksFreed(Event, tag=14):
    """Reference counts went down by one; those at zero joined the free queue, in this order."""

    kind: ClassVar[str] = "blocks.freed"
    blocks: list[int]
    ref_cnts: list[int]
    """After the free."""


class PrefixCacheReset(Event, tag=15):
    """``reset_prefix_cache``: all hashes forgotten, or refused because blocks are in use."""

    kind: ClassVar[str] = "prefix.reset"
    ok: bool


class StepScheduled(Event, tag=16):
    """``Scheduler.schedule`` returned: this is planned, not yet executed.

    A scheduled request without a ``slots.allocated`` of its own since the last step is one for
    which ``allocate_slots`` succeeded without a new block; ``num_kept`` counts those calls.
    """

    kind: ClassVar[str] = "step.scheduled"
    step: int
    started_ns: int
    dur_ns: int
    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_kept: int
    requests: list[int] | None = None
    """In the order of scheduling. On disk None stands for "as in the last step", here and in
    ``num_tokens``; readers put the list back."""
    num_tokens: list[int] | None = None
    new: list[int] = []
    resumed: list[int] = []
    preempted: list[int] = []
    finished: list[int] = []
    """Finished since the last step, told to the workers now."""
    num_spec_tokens: dict[int, int] = {}
    kept: list[int] = []
    """Whose calls those of ``num_kept`` were, spelled out in a step that preempted somebody;
    otherwise they are the requests without a ``slots.allocated``, in the order of the step."""


class StepUpdated(Event, tag=17):
    """``update_from_output`` returned: results of the step are in."""

    kind: ClassVar[str] = "step.updated"
    step: int
    started_ns: int
    dur_ns: int
    num_output_tokens: list[int] | None = None
    """Sampled per request, in the order of ``step.scheduled``. On disk None stands for one each;
    at level ``light`` it stays None."""
    token_ids: list[list[int]] | None = None
    """Only with ``--tokens``."""


class StepExecuted(Event, tag=18):
    """A worker ran the step."""

    kind: ClassVar[str] = "step.executed"
    step: int
    started_ns: int
    dur_ns: int
    forward_ns: int
    """When the model's forward began; 0 when there was none."""
    forward_dur_ns: int
    rank: int
    num_tokens: int
    num_tokens_padded: int
    mode: str
    """How the model ran: ``eager``, ``piecewise``, ``full`` (CUDA graphs)."""
    device_dur_ns: int = 0
    """The forward on the device, between events on its stream; 0 where there is none."""


class TableRowChanged(Event, tag=19):
    """A row of the block table that a kernel received, where it differs from the last one."""

    kind: ClassVar[str] = "table.changed"
    step: int
    group: int
    request: int
    first: int
    """Position in the row of the first id given; everything from there on is replaced."""
    blocks: list[int]


class SlotsMapped(Event, tag=20):
    """The flattened batch as the attention metadata carries it."""

    kind: ClassVar[str] = "slots.mapped"
    step: int
    group: int
    block_size: int
    """Tokens in a block of the manager."""
    kernel_block_size: int
    """Tokens in a block of the kernel; ids in ``table.changed`` count these."""
    requests: list[int]
    query_lens: list[int]
    seq_lens: list[int]
    slots: list[int]
    """One per token; -1 is padding."""


class AttentionPlanned(Event, tag=21):
    """Which variant of the kernel this step uses, and the numbers it was chosen from."""

    kind: ClassVar[str] = "attention.planned"
    step: int
    group: int
    kernel: str
    variant: str
    numbers: dict[str, int]
    layers: list[int] = []
    """Layers that this choice was made for; empty: all of the group."""
    reason: str = ""
    """The rule that chose, in words with its numbers."""


class AttentionCalled(Event, tag=22):
    """The attention implementation ran, once for each layer in this order."""

    kind: ClassVar[str] = "attention.called"
    step: int
    kernel: str
    layers: list[int]
    started_ns: list[int]
    dur_ns: list[int]
    clock: str = "host"
    """``host``: monotonic clock around the call. ``cuda``: events on the stream; ``started_ns`` is
    then when the host launched it."""
    worst: list[tuple[float, float, int, int]] = []
    """Shadow: for each layer the largest error against the from-scratch kernel: absolute, relative
    to the largest value that was read, and the request and position where it was."""
    tolerance: float = 0.0
    """Shadow: how large the relative error may be with this dtype."""
    beyond: dict[str, Any] = {}
    """Shadow: the first call of this process beyond it, with its table, slots and saved inputs."""


class BackendSelected(Event, tag=23):
    """A layer was given its attention backend."""

    kind: ClassVar[str] = "backend.selected"
    layer: str
    backend: str
    impl: str
    candidates: list[tuple[str, str]]
    """(name, vLLM's reason for rejecting it; empty for the winner)."""
    settings: dict[str, Any]


class ProbeFailed(Event, tag=24):
    """One of our probes raised; the engine's own call was not affected."""

    kind: ClassVar[str] = "probe.failed"
    hook: str
    error: str


class RequestSeen(Event, tag=25):
    """A process that did not see the request arrive gave it a number of its own."""

    kind: ClassVar[str] = "request.seen"
    request: int
    request_id: str


class KVEventsTaken(Event, tag=26):
    """vLLM's own KV events, when they are on: (``stored`` | ``removed`` | ``cleared``, hashes)."""

    kind: ClassVar[str] = "kv_events.taken"
    events: list[tuple[str, list[int]]]


class EngineStopped(Event, tag=27):
    """The engine was shut down on purpose."""

    kind: ClassVar[str] = "engine.stopped"
    at_ns: int


class StepSampled(Event, tag=28):
    """A worker turned the step's logits into tokens."""

    kind: ClassVar[str] = "step.sampled"
    step: int
    started_ns: int
    dur_ns: int
    rank: int


AnyEvent = Union[  # noqa: UP007 - msgspec wants the closed union as one value
    EngineConfigured,
    RequestArrived,
    RequestFinished,
    RequestPreempted,
    RequestFreed,
    PrefixLookedUp,
    SlotsAllocated,
    SlotsRefused,
    BlocksTaken,
    BlockEvicted,
    BlocksTouched,
    BlocksCached,
    BlocksFreed,
    PrefixCacheReset,
    StepScheduled,
    StepUpdated,
    StepExecuted,
    TableRowChanged,
    SlotsMapped,
    AttentionPlanned,
    AttentionCalled,
    BackendSelected,
    ProbeFailed,
    RequestSeen,
    KVEventsTaken,
    EngineStopped,
    StepSampled,
]

EVENT_TYPES: tuple[type[Event], ...] = get_args(AnyEvent)
KINDS: dict[str, type[Event]] = {cls.kind: cls for cls in EVENT_TYPES}


def tag_of(event: type[Event]) -> int:
    """The first number of the event's array on disk."""
    tag = event.__struct_config__.tag
    assert isinstance(tag, int)
    return tag


def to_dict(event: Event) -> dict[str, Any]:
    """Fields by name, ``kind`` first: the form of JSON lines and of tables."""
    return {"kind": event.kind} | {
        name: msgspec.to_builtins(getattr(event, name)) for name in event.__struct_fields__
    }
