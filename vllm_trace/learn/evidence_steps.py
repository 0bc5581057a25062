"""What a trace shows about steps, and for part 3's topics; see ``evidence``."""

from __future__ import annotations

from vllm_trace.learn.book import Book, StepSeen, cdiv
from vllm_trace.learn.evidence import evidence, ids, ms, table
from vllm_trace.learn.questions import many

# The loop ----------------------------------------------------------------------------------


def longest_request(book: Book) -> int:
    """The request with most steps."""
    count: dict[int, int] = {}
    for step in book.steps:
        for request in step.counts:
            count[request] = count.get(request, 0) + 1
    return max(count, key=lambda r: count[r])


@evidence
def loop(book: Book) -> list[str]:
    """Input, cache, output: one row for each step of a request."""
    request, rows = longest_request(book), []
    for step in book.steps:
        if request not in step.counts:
            continue
        before, count = step.before[request], step.counts[request]
        given = f"{before}–{before + count - 1}" if count > 1 else f"{before}"
        rows.append([step.number, given, before, before + count, f"token {before + count}"])
    lines = [f"{book.name(request)}: positions count from 0"]
    lines += table(["step", "input positions", "cached before", "after", "output"], rows, 12)
    return [*lines, "", "the output of a step is the input of the next; its K and V come then"]


def mixed_step(book: Book) -> StepSeen:
    """A step with a prompt and somebody who decodes, or the fullest one."""
    for step in book.steps:
        counts = list(step.counts.values())
        if len(counts) > 1 and min(counts) == 1 and max(counts) > 1 and step.mapped:
            return step
    return max(book.steps, key=lambda s: (bool(s.mapped), len(s.counts)))


@evidence
def flat_batch(book: Book) -> list[str]:
    """The flattened batch of a step: request, position and slot of each token."""
    step = mixed_step(book)
    event = step.scheduled
    parts = [f"schedule {ms(event.dur_ns)}"]
    if step.executed:
        parts.append(f"forward {ms(step.executed.forward_dur_ns)}")
    if step.updated:
        parts.append(f"postprocess {ms(step.updated.dur_ns)}")
    lines = [f"step {step.number}: " + ", ".join(parts)]
    said = ", ".join(f"{book.name(r)} {n}" for r, n in step.counts.items())
    lines.append(f"  {said} tokens" if len(said) < 68 else f"  {said[:66]}…")
    rows = []
    for token in step.tokens():
        block, place = divmod(token.slot, book.block_size)
        rows.append(
            [
                token.place,
                book.name(token.request)[:16],
                token.position,
                token.slot,
                f"block {block}, place {place}",
            ]
        )
    return [*lines, "", *table(["token", "request", "position", "slot", "which is"], rows, 12)]


@evidence
def joins(book: Book) -> list[str]:
    """Steps in which somebody came or went."""
    rows: list[list[object]] = []
    last: set[int] = set()
    for step in book.steps:
        now = set(step.counts)
        if now != last:
            came = ", ".join(book.name(r) for r in step.counts if r not in last)
            went = ", ".join(book.name(r) for r in sorted(last - now))
            said = " ".join(
                filter(None, [f"+ {came}" if came else "", f"- {went}" if went else ""])
            )
            rows.append([step.number, len(now), step.num_tokens, said])
        last = now
    return table(["step", "in the batch", "tokens", "who came, who went"], rows, 16)


@evidence
def phases(book: Book) -> list[str]:
    """What prefill and decode did to each request's cache."""
    rows = []
    for request, arrived in list(book.arrived.items())[:6]:
        prompt = arrived.num_prompt_tokens
        parts: dict[str, list[int]] = {}
        for step in book.steps:
            if request in step.counts:
                before, count = step.before[request], step.counts[request]
                kind = "prefill" if before < prompt else "decode"
                seen = parts.setdefault(kind, [0, 0, before, before])
                seen[0] += 1
                seen[1] += count
                seen[3] = before + count
        for kind, (steps, tokens, low, high) in parts.items():
            each = f"{tokens / steps:.0f} a step"
            rows.append([book.name(request), kind, steps, tokens, low, high, each])
    head = ["request", "phase", "steps", "tokens in", "cache before", "after", ""]
    return table(head, rows, 14)


# Part 3 ------------------------------------------------------------------------------------


@evidence
def heads(book: Book) -> list[str]:
    """Which KV head each query head reads, and what fewer KV heads save."""
    per = book.num_heads // book.num_kv_heads
    rows = [[head, head // per] for head in range(min(book.num_heads, 8))]
    lines = [f"{book.num_heads} query heads, {book.num_kv_heads} KV heads: {per} share one"]
    lines += table(["query head", "KV head"], rows)
    lines += [""]
    kinds = []
    for name, kv in (("MHA", book.num_heads), ("GQA", book.num_kv_heads), ("MQA", 1)):
        token = 2 * kv * book.head_size * book.element_size * book.num_layers
        mark = "<- this model" if kv == book.num_kv_heads else ""
        kinds.append([name, kv, token, token * book.block_size, mark])
    return [*lines, *table(["kind", "KV heads", "bytes a token", "a block", ""], kinds)]


@evidence
def tiles(book: Book) -> list[str]:
    """A prefill step as FlashAttention does it: never the whole matrix of scores."""
    step = max(book.steps, key=lambda s: max(s.counts.values()))
    request = max(step.counts, key=lambda r: step.counts[r])
    query, context = step.counts[request], step.before[request] + step.counts[request]
    per = cdiv(context, book.block_size)
    whole = query * context * book.num_heads * 4
    tile = query * book.block_size * book.num_heads * 4
    return [
        f"step {step.number}: {many(query, 'new token')} of {book.name(request)} and {context} keys",
        f"scores, all at once   {query} x {context} x {book.num_heads} heads x 4 bytes"
        f" = {whole} bytes",
        f"scores, block by block  {query} x {book.block_size} x {book.num_heads} x 4"
        f" = {tile} bytes at a time",
        f"tiles of {book.block_size} keys: {per}; after each, what was added up so far is",
        "rescaled by exp(old maximum - new maximum)",
        "",
        "With paging a tile is a block (or part of one): where it lies is looked up in",
        f"the table, {per} times here; inside it keys are contiguous as ever.",
    ]


@evidence
def scales(book: Book) -> list[str]:
    """What a scale does to the range of FP8 and INT8."""
    rows = []
    for amax in (0.5, 4.0, 448.0, 2000.0):
        fp8, int8 = amax / 448, amax / 127
        rows.append(
            [
                f"{amax:g}",
                f"{fp8:.4g}",
                f"{int8:.4g}",
                "clipped to 448" if amax > 448 else "fits",
            ]
        )
    token = 2 * book.num_kv_heads * book.head_size
    lines = ["largest |value|, the scale that makes it fit, and what happens without one:"]
    lines += table(["largest", "FP8 scale (/448)", "INT8 scale (/127)", "FP8 without"], rows)
    return [
        *lines,
        "",
        f"a token of this model: {token} elements a layer, {token * book.element_size} bytes now,",
        f"{token} with one byte each, and {token + 8 * book.num_kv_heads} with a float scale for each"
        " K and V head",
    ]


@evidence
def ranks(book: Book) -> list[str]:
    """The same tables on several GPUs."""
    rows = []
    for size in (1, 2, 4, 8):
        kv = max(1, book.num_kv_heads // size)
        page = book.page_bytes // book.num_kv_heads * kv
        note = "heads repeated" if size > book.num_kv_heads else ""
        rows.append([size, kv, page, ids(book.allocations[0].table, 6), note])
    lines = ["tensor parallel: each rank has some of the heads, of every block"]
    lines += table(["ranks", "KV heads each", "bytes a block", "table on each", ""], rows)
    return [
        *lines,
        "",
        f"{len(book.steps)} schedules made one table each, whatever the number of ranks;",
        "the pool is as large as the rank with the least memory allows",
    ]


@evidence
def fusion(book: Book) -> list[str]:
    """What is not written when operations are fused."""
    step = max(book.steps, key=lambda s: s.num_tokens)
    scores = sum(
        count * (step.before[r] + count) * book.num_heads * 4 for r, count in step.counts.items()
    )
    out = step.num_tokens * book.num_heads * book.head_size * book.element_size
    calls = sum(len(s.called.dur_ns) for s in book.steps if s.called)
    return [
        f"step {step.number}, {many(step.num_tokens, 'token')}, one layer:",
        f"  scores QK          {scores} bytes, written and read twice if not fused",
        f"  the output         {out} bytes",
        "",
        f"attention kernel calls in this trace: {calls} = {book.num_layers} layers x"
        f" {calls // max(1, book.num_layers)} steps",
        "  unfused (QK, scale, mask, softmax, V): five times as many launches",
        f"  the write to the cache is a kernel of its own: {calls} more",
    ]
