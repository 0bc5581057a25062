"""Names of spans, their events and their attributes: the one list that code and documentation use.

``gen_ai.*``, ``error.type``, ``service.*``, ``host.*`` and ``process.*`` are OpenTelemetry's own
names; what these do not have begins with ``vllm_trace.`` and ends in vLLM's word for it.
"""

from __future__ import annotations

from dataclasses import dataclass

SPANS = {
    "llm_request": "A request, from its arrival to its finish. Kind SERVER; its parent is the client's span when vLLM "
    "passed a `traceparent` on.",
    "queued": "In the waiting queue: from arrival, or from a preemption, to admission. Event `refused` for each time "
    "that `allocate_slots` returned None.",
    "schedule": "Of a request: a call of `Scheduler.schedule` that gave it prompt tokens to compute. Of a step: the "
    "call itself.",
    "prefix_lookup": "`get_computed_blocks` as it was when the request was admitted.",
    "allocate": "`allocate_slots` that gave new blocks or took over hits.",
    "prefill": "A chunk of the prompt (after a preemption: of all tokens so far), from its schedule to its results.",
    "decode": "Steps in a row that generated tokens; an event `step` for each. A new span begins after 1024 steps.",
    "decode_step": "With `--detail`: one step of a decode.",
    "preempt": "The request gave its blocks back and waits again.",
    "free": "`KVCacheManager.free`: the request's blocks went back, tail first.",
    "engine_step": "A step of the engine, a trace of its own, from schedule to postprocess.",
    "execute": "A worker ran the step.",
    "forward": "The model's forward within `execute`.",
    "attention": "The attention calls of one KV-cache group within `forward`: from the first to the last.",
    "sample": "A worker turned logits into tokens.",
    "postprocess": "`update_from_output`.",
}
"""Name → what it is. Facts within a call of the scheduler (`prefix_lookup`, `allocate`, `preempt`, `free`) have an
order and no time of their own: they stand at the beginning of the call, a nanosecond apart, without a length."""

EVENTS = {
    "step": "on `decode`: results of a step are in.",
    "first_token": "on `llm_request`: the first token is in.",
    "refused": "on `queued`, `decode` and, when the request itself gave way, `llm_request`: `allocate_slots` "
    "returned None.",
    "abort": "on `llm_request`: the request was aborted.",
    "trace_ended": "on a span that was open when the trace ended.",
}


@dataclass(frozen=True)
class Attribute:
    """One line of the table."""

    name: str
    type: str
    """``int``, ``string``, ``double``, ``bool``, ``int[]``, ``string[]``."""
    on: str
    """Spans, events or ``resource`` that carry it."""
    text: str


ATTRIBUTES: dict[str, Attribute] = {}


def _attribute(name: str, type: str, on: str, text: str) -> str:
    ATTRIBUTES[name] = Attribute(name, type, on, text)
    return name


# Of OpenTelemetry -----------------------------------------------------------------------

OPERATION = _attribute(
    "gen_ai.operation.name",
    "string",
    "llm_request",
    "`chat` for the server's `chatcmpl-…` requests, else `text_completion`",
)
PROVIDER = _attribute("gen_ai.provider.name", "string", "llm_request", "`vllm`")
REQUEST_MODEL = _attribute("gen_ai.request.model", "string", "llm_request", "the engine's model")
RESPONSE_MODEL = _attribute("gen_ai.response.model", "string", "llm_request", "the same")
MAX_TOKENS = _attribute("gen_ai.request.max_tokens", "int", "llm_request", "tokens to generate")
TEMPERATURE = _attribute("gen_ai.request.temperature", "double", "llm_request", "as sampled with")
TOP_P = _attribute("gen_ai.request.top_p", "double", "llm_request", "as sampled with")
TOP_K = _attribute(
    "gen_ai.request.top_k", "double", "llm_request", "as sampled with; none when off"
)
SEED = _attribute("gen_ai.request.seed", "int", "llm_request", "when one was given")
CHOICES = _attribute("gen_ai.request.choice.count", "int", "llm_request", "`n`, when above 1")
INPUT_TOKENS = _attribute("gen_ai.usage.input_tokens", "int", "llm_request", "prompt tokens")
OUTPUT_TOKENS = _attribute("gen_ai.usage.output_tokens", "int", "llm_request", "generated tokens")
CACHE_READ = _attribute(
    "gen_ai.usage.cache_read.input_tokens",
    "int",
    "llm_request",
    "prompt tokens that the prefix cache had at the first admission",
)
FINISH_REASONS = _attribute(
    "gen_ai.response.finish_reasons", "string[]", "llm_request", "vLLM's reason, one"
)
ERROR_TYPE = _attribute("error.type", "string", "llm_request", "`abort` or `error`")
SERVICE_NAME = _attribute(
    "service.name", "string", "resource", "`vllm`, or what `OTEL_SERVICE_NAME` says"
)
SERVICE_VERSION = _attribute("service.version", "string", "resource", "of vLLM")
SERVICE_INSTANCE = _attribute("service.instance.id", "string", "resource", "host and process id")
HOST_NAME = _attribute("host.name", "string", "resource", "where it was recorded")
PROCESS_PID = _attribute("process.pid", "int", "resource", "of the vLLM process")
RUNTIME_NAME = _attribute("process.runtime.name", "string", "resource", "`cpython`")
RUNTIME_VERSION = _attribute("process.runtime.version", "string", "resource", "of Python")
DISTRO_NAME = _attribute("telemetry.distro.name", "string", "resource", "`vllm_trace`")
DISTRO_VERSION = _attribute("telemetry.distro.version", "string", "resource", "of vllm_trace")

# Ours -----------------------------------------------------------------------------------

ROLE = _attribute("vllm_trace.role", "string", "resource", "`engine`, `worker` or `main`")
RANK = _attribute("vllm_trace.rank", "int", "resource execute sample", "of the worker")
LEVEL = _attribute("vllm_trace.level", "string", "resource", "`full` or `light`")
MODEL = _attribute("vllm_trace.model", "string", "resource", "the engine's model")
VLLM = _attribute("vllm_trace.vllm.version", "string", "resource", "the same as service.version")
PLATFORM = _attribute("vllm_trace.platform", "string", "resource", "`cpu` or `cuda`")

REQUEST_ID = _attribute("vllm_trace.request.id", "string", "llm_request", "as the engine knows it")
REQUEST_NUMBER = _attribute("vllm_trace.request.number", "int", "llm_request", "in the trace")
PRIORITY = _attribute("vllm_trace.request.priority", "int", "llm_request", "when not 0")
LORA = _attribute("vllm_trace.request.lora", "string", "llm_request", "name of the LoRA")
SALTED = _attribute("vllm_trace.request.salted", "bool", "llm_request", "it had a cache salt")
NUM_PREEMPTIONS = _attribute("vllm_trace.num_preemptions", "int", "llm_request", "of the request")
NUM_REFUSALS = _attribute(
    "vllm_trace.num_refusals", "int", "llm_request queued", "times that `allocate_slots` said no"
)
NUM_CHUNKS = _attribute("vllm_trace.num_chunks", "int", "llm_request", "prefill spans")
NUM_STEPS = _attribute("vllm_trace.num_steps", "int", "llm_request decode", "it was scheduled in")
QUEUED_NS = _attribute("vllm_trace.queued_ns", "int", "llm_request", "ns in all queued spans")
TTFT_NS = _attribute(
    "vllm_trace.time_to_first_token_ns", "int", "llm_request", "ns from the span's beginning"
)
PROMPT_TOKEN_IDS = _attribute(
    "vllm_trace.prompt_token_ids", "int[]", "llm_request", "only with `--tokens`, twice"
)
OUTPUT_TOKEN_IDS = _attribute(
    "vllm_trace.output_token_ids", "int[]", "llm_request", "only with `--tokens`, twice"
)
BAD_TRACEPARENT = _attribute(
    "vllm_trace.traceparent.invalid", "bool", "llm_request", "the client's was not W3C's form"
)
INCOMPLETE = _attribute(
    "vllm_trace.incomplete",
    "bool",
    "any",
    "its beginning or end is not in the trace: truncated, dropped, or recorded too late",
)

STEP = _attribute(
    "vllm_trace.step",
    "int",
    "schedule prefill preempt decode_step engine_step step refused",
    "number of the step, as `show steps` prints it",
)
FIRST_STEP = _attribute("vllm_trace.first_step", "int", "decode", "its first step")
LAST_STEP = _attribute("vllm_trace.last_step", "int", "decode", "its last step")
NUM_TOKENS = _attribute(
    "vllm_trace.num_tokens", "int", "schedule prefill decode_step execute", "computed in the step"
)
NUM_COMPUTED = _attribute(
    "vllm_trace.num_computed_tokens",
    "int",
    "schedule prefill preempt",
    "tokens computed before; of a preemption: tokens given up",
)
NUM_OUTPUT = _attribute(
    "vllm_trace.num_output_tokens",
    "int",
    "prefill decode decode_step step engine_step",
    "tokens generated",
)
RESUMED = _attribute(
    "vllm_trace.resumed", "bool", "queued schedule", "it was preempted and comes again"
)
EXPECTED = _attribute(
    "vllm_trace.prefix.expected_tokens",
    "int",
    "prefix_lookup",
    "the most that can be hit: full blocks, the last token left out",
)
MATCHED = _attribute("vllm_trace.prefix.matched_tokens", "int", "prefix_lookup", "what was hit")
REASON = _attribute(
    "vllm_trace.prefix.reason",
    "string",
    "prefix_lookup",
    "why not more: `all hit`, `none shared`, `evicted`, `short`, `logits`, `reset`, `group`, "
    "`cache off`, `unread`, `unknown` (`explain` tells the story)",
)
NUM_LOOKUPS = _attribute(
    "vllm_trace.prefix.num_lookups", "int", "prefix_lookup", "calls since it waited, this one too"
)
EVICTED_BY = _attribute(
    "vllm_trace.prefix.taken_by", "string", "prefix_lookup", "request that got the missing block"
)
MISSING_BLOCK = _attribute(
    "vllm_trace.prefix.missing_block", "int", "prefix_lookup", "logical position of the first miss"
)
NUM_NEW_BLOCKS = _attribute(
    "vllm_trace.num_new_blocks", "int", "allocate decode", "blocks taken from the free queue"
)
NEW_BLOCKS = _attribute(
    "vllm_trace.new_blocks", "int[]", "allocate", "their ids, groups in a row; the first 128"
)
HIT_BLOCKS = _attribute(
    "vllm_trace.hit_blocks", "int[]", "allocate", "ids taken over from the prefix cache"
)
NUM_HIT = _attribute("vllm_trace.num_hit_tokens", "int", "allocate refused", "tokens of the hits")
NUM_EVICTED = _attribute(
    "vllm_trace.num_evicted", "int", "allocate", "blocks whose cached content had to go for it"
)
FREE_BEFORE = _attribute(
    "vllm_trace.free_blocks.before", "int", "allocate free", "in the pool before the call"
)
FREE_AFTER = _attribute(
    "vllm_trace.free_blocks.after", "int", "allocate free preempt refused", "after it"
)
CAUSED_BY = _attribute(
    "vllm_trace.caused_by", "string", "preempt", "request that `allocate_slots` had refused"
)
NUM_FREED = _attribute("vllm_trace.num_blocks", "int", "free", "blocks of the request")
FREED_BLOCKS = _attribute(
    "vllm_trace.freed_blocks", "int[]", "free", "their ids in the order freed; the first 128"
)
NUM_SHARED = _attribute("vllm_trace.num_still_held", "int", "free", "that others hold too")

NUM_REQUESTS = _attribute("vllm_trace.num_requests", "int", "engine_step", "scheduled in it")
NUM_RUNNING = _attribute(
    "vllm_trace.num_running", "int", "engine_step schedule", "in the running queue"
)
NUM_WAITING = _attribute("vllm_trace.num_waiting", "int", "engine_step schedule", "still waiting")
NUM_FREE = _attribute("vllm_trace.free_blocks", "int", "engine_step", "after the schedule")
PREFILL_TOKENS = _attribute("vllm_trace.num_prefill_tokens", "int", "engine_step", "of the step")
DECODE_TOKENS = _attribute("vllm_trace.num_decode_tokens", "int", "engine_step", "of the step")
NUM_NEW = _attribute("vllm_trace.num_joined", "int", "engine_step", "admitted, resumed ones too")
NUM_PREEMPTED = _attribute("vllm_trace.num_preempted", "int", "engine_step", "in the schedule")
NUM_PADDED = _attribute("vllm_trace.num_tokens_padded", "int", "execute", "as the model ran them")
MODE = _attribute("vllm_trace.mode", "string", "execute", "`eager`, `piecewise`, `full`, `none`")
GROUP = _attribute("vllm_trace.attention.group", "int", "attention", "KV-cache group")
KERNEL = _attribute("vllm_trace.attention.kernel", "string", "attention", "that ran")
VARIANT = _attribute("vllm_trace.attention.variant", "string", "attention", "of the kernel")
IMPL = _attribute("vllm_trace.attention.impl", "string", "attention", "vLLM's class")
BACKEND = _attribute("vllm_trace.attention.backend", "string", "attention", "of its layers")
NUM_CALLS = _attribute("vllm_trace.attention.num_calls", "int", "attention", "one for each layer")
CALLS_NS = _attribute("vllm_trace.attention.dur_ns", "int", "attention", "ns in these calls")
CLOCK = _attribute("vllm_trace.attention.clock", "string", "attention", "`host` or `cuda`")


def span_table() -> str:
    """Markdown: every span."""
    lines = ["| span | |", "|---|---|"]
    lines += [f"| `{name}` | {text} |" for name, text in SPANS.items()]
    return "\n".join(lines)


def event_table() -> str:
    """Markdown: every span event."""
    lines = ["| event | |", "|---|---|"]
    lines += [f"| `{name}` | {text} |" for name, text in EVENTS.items()]
    return "\n".join(lines)


def attribute_table() -> str:
    """Markdown: every attribute."""
    lines = ["| attribute | type | on | |", "|---|---|---|---|"]
    for one in ATTRIBUTES.values():
        on = " ".join(f"`{name}`" for name in one.on.split())
        lines.append(f"| `{one.name}` | {one.type} | {on} | {one.text} |")
    return "\n".join(lines)
