"""The span arm: OpenTelemetry as a user would put it at the same points.

One span for each call of a hooked function, with the facts of our event as its attributes, through
the SDK's ``BatchSpanProcessor`` to an exporter that makes OTLP protobuf and drops it. The queue is
made large enough that no span is lost, because our arms lose no event either.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

QUEUE_SIZE = 200_000


class DroppingExporter(SpanExporter):
    """Serializes to OTLP protobuf, as an exporter does, and sends nothing."""

    def __init__(self) -> None:
        self.num_spans = 0
        self.num_bytes = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.num_bytes += len(encode_spans(spans).SerializeToString())
        self.num_spans += len(spans)
        return SpanExportResult.SUCCESS


class SpanTracer:
    """Puts a span around each target and takes it off again."""

    def __init__(self) -> None:
        self._exporter = DroppingExporter()
        self._provider = TracerProvider(resource=Resource.create({"service.name": "vllm"}))
        self._processor = BatchSpanProcessor(self._exporter, max_queue_size=QUEUE_SIZE)
        self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer("bench")
        self._placed: list[tuple[Any, str, Any]] = []
        self.force_flush = self._processor.force_flush

    @property
    def num_exported(self) -> int:
        return self._exporter.num_spans

    @staticmethod
    def locate(target: str) -> tuple[Any, str]:
        """``package.module:Class.method`` as (class, name of the method)."""
        module, _, qualname = target.partition(":")
        owner, _, name = qualname.partition(".")
        return getattr(importlib.import_module(module), owner), name

    def install(self, targets: Iterable[str]) -> None:
        for target in targets:
            owner, name = self.locate(target)
            before = vars(owner)[name]
            setattr(owner, name, self._spanned(before, ATTRIBUTES.get(name, no_attributes)))
            self._placed.append((owner, name, before))

    def undo(self) -> None:
        for owner, name, before in reversed(self._placed):
            setattr(owner, name, before)
        self._provider.shutdown()

    def _spanned(self, function: Any, attributes: Callable[..., dict[str, Any]]) -> Any:
        start_span, name = self._tracer.start_as_current_span, function.__qualname__

        @functools.wraps(function)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            with start_span(name) as span:
                result = function(self, *args, **kwargs)
                span.set_attributes(attributes(self, result, *args, **kwargs))
                return result

        return wrapper


# What our probes read at each point, as span attributes: numbers, strings and flat lists.


def no_attributes(self: Any, result: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return {}


def schedule(self: Any, result: Any, *args: Any) -> dict[str, Any]:
    return {
        "num_running": len(self.running),
        "num_waiting": len(self.waiting),
        "num_free_blocks": self.kv_cache_manager.block_pool.get_num_free_blocks(),
        "requests": list(result.num_scheduled_tokens),
        "num_tokens": list(result.num_scheduled_tokens.values()),
    }


def update_from_output(self: Any, result: Any, scheduler_output: Any, made: Any) -> dict[str, Any]:
    return {"num_output_tokens": [len(tokens) for tokens in made.sampled_token_ids]}


def allocate_slots(
    self: Any,
    result: Any,
    request: Any,
    num_new_tokens: int,
    num_new_computed_tokens: int = 0,
    *args: Any,
    **kwargs: Any,
) -> dict[str, Any]:
    attributes = {
        "request": request.request_id,
        "num_new_tokens": num_new_tokens,
        "num_hit_tokens": num_new_computed_tokens,
        "num_free_blocks": self.block_pool.get_num_free_blocks(),
    }
    if result is not None:
        attributes["blocks"] = [b.block_id for group in result.blocks for b in group]
    return attributes


def get_computed_blocks(self: Any, result: Any, request: Any) -> dict[str, Any]:
    return {
        "request": request.request_id,
        "num_tokens": request.num_tokens,
        "num_hit_tokens": result[1],
        "blocks": [b.block_id for group in result[0].blocks for b in group],
    }


def get_new_blocks(self: Any, result: Any, num_blocks: int) -> dict[str, Any]:
    return {"blocks": [b.block_id for b in result]}


def cache_full_blocks(
    self: Any,
    result: Any,
    request: Any,
    blocks: Any,
    num_cached_blocks: int,
    num_full_blocks: int,
    *args: Any,
    **kwargs: Any,
) -> dict[str, Any]:
    full = blocks[num_cached_blocks:num_full_blocks]
    return {
        "request": request.request_id,
        "first": num_cached_blocks,
        "blocks": [b.block_id for b in full],
        "hashes": [b.block_hash.hex() for b in full if b.block_hash],
    }


def of_request(self: Any, result: Any, request: Any, *args: Any, **kw: Any) -> dict[str, Any]:
    return {"request": request.request_id}


ATTRIBUTES = {
    "schedule": schedule,
    "update_from_output": update_from_output,
    "allocate_slots": allocate_slots,
    "get_computed_blocks": get_computed_blocks,
    "get_new_blocks": get_new_blocks,
    "cache_full_blocks": cache_full_blocks,
    "add_request": of_request,
    "free": of_request,
    "_free_request": of_request,
    "_preempt_request": of_request,
}
