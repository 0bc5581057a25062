"""The forms of all spans and their events: which attributes each can have. ``attributes`` says what they mean.

Attributes in parentheses come together: few of their combinations are met, and each is made once.
"""

from __future__ import annotations

from vllm_trace.export import attributes as a
from vllm_trace.export.span import SERVER, Form

# Of a request ---------------------------------------------------------------------------

LLM_REQUEST = Form(
    "llm_request",
    (a.OPERATION, a.PROVIDER, a.REQUEST_MODEL, a.RESPONSE_MODEL),
    a.REQUEST_ID,
    a.REQUEST_NUMBER,
    a.INPUT_TOKENS,
    (a.MAX_TOKENS, a.TEMPERATURE, a.TOP_P, a.TOP_K, a.SEED, a.CHOICES),
    (a.PRIORITY, a.LORA, a.SALTED, a.BAD_TRACEPARENT, a.FINISH_REASONS, a.ERROR_TYPE),
    a.CACHE_READ,
    a.OUTPUT_TOKENS,
    (a.NUM_PREEMPTIONS, a.NUM_CHUNKS, a.NUM_REFUSALS),
    a.NUM_STEPS,
    a.QUEUED_NS,
    a.TTFT_NS,
    a.INCOMPLETE,
    a.PROMPT_TOKEN_IDS,
    a.OUTPUT_TOKEN_IDS,
    kind=SERVER,
)
QUEUED = Form("queued", a.NUM_REFUSALS, a.RESUMED, a.INCOMPLETE)
SCHEDULE = Form(
    "schedule", a.STEP, a.NUM_TOKENS, a.NUM_COMPUTED, (a.NUM_RUNNING, a.NUM_WAITING, a.RESUMED)
)
PREFIX_LOOKUP = Form(
    "prefix_lookup", a.MATCHED, a.EXPECTED, (a.REASON, a.NUM_LOOKUPS), a.MISSING_BLOCK, a.EVICTED_BY
)
ALLOCATE = Form(
    "allocate",
    a.NUM_NEW_BLOCKS,
    a.NEW_BLOCKS,
    a.FREE_AFTER,
    a.FREE_BEFORE,
    a.NUM_EVICTED,
    a.NUM_HIT,
    a.HIT_BLOCKS,
)
PREFILL = Form("prefill", a.STEP, a.NUM_TOKENS, a.NUM_COMPUTED, a.NUM_OUTPUT, a.INCOMPLETE)
DECODE = Form(
    "decode",
    a.NUM_OUTPUT,
    a.NUM_STEPS,
    a.FIRST_STEP,
    a.LAST_STEP,
    a.NUM_NEW_BLOCKS,
    a.INCOMPLETE,
)
DECODE_STEP = Form("decode_step", a.STEP, a.NUM_OUTPUT)
PREEMPT = Form("preempt", a.STEP, a.NUM_COMPUTED, a.FREE_AFTER, a.CAUSED_BY)
FREE = Form("free", a.NUM_FREED, a.FREED_BLOCKS, a.NUM_SHARED, a.FREE_BEFORE, a.FREE_AFTER)

# Of a step ------------------------------------------------------------------------------

ENGINE_STEP = Form(
    "engine_step",
    a.STEP,
    a.NUM_FREE,
    (a.NUM_REQUESTS, a.NUM_RUNNING, a.NUM_WAITING, a.DECODE_TOKENS, a.NUM_OUTPUT),
    a.PREFILL_TOKENS,
    (a.NUM_NEW, a.NUM_PREEMPTED, a.INCOMPLETE),
)
STEP_SCHEDULE = Form("schedule")
POSTPROCESS = Form("postprocess")
EXECUTE = Form("execute", (a.RANK, a.NUM_TOKENS, a.NUM_PADDED, a.MODE))
FORWARD = Form("forward")
ATTENTION = Form(
    "attention",
    (a.GROUP, a.KERNEL, a.VARIANT, a.IMPL, a.NUM_CALLS, a.CLOCK, a.BACKEND),
    a.CALLS_NS,
)
SAMPLE = Form("sample", a.RANK)

# Events ---------------------------------------------------------------------------------

STEP = Form("step", a.STEP, a.NUM_OUTPUT)
REFUSED = Form("refused", a.STEP, a.FREE_AFTER, a.NUM_HIT)
FIRST_TOKEN = Form("first_token")
ABORT = Form("abort")
TRACE_ENDED = Form("trace_ended")

EVENTS = (STEP, REFUSED, FIRST_TOKEN, ABORT, TRACE_ENDED)
SPANS = (
    LLM_REQUEST, QUEUED, SCHEDULE, PREFIX_LOOKUP, ALLOCATE, PREFILL, DECODE, DECODE_STEP, PREEMPT,
    FREE, ENGINE_STEP, STEP_SCHEDULE, POSTPROCESS, EXECUTE, FORWARD, ATTENTION, SAMPLE,
)  # fmt: skip
