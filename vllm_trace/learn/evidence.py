"""What a trace shows for each step, as lines of at most 78 characters for a terminal.

Each function takes a ``Book`` and returns lines; ``EVIDENCE`` names them for ``steps/*.toml``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vllm_trace.learn.book import MAX_V1, PARTITION, Book, StepSeen, cdiv

View = Callable[[Book], list[str]]
EVIDENCE: dict[str, View] = {}
ROWS = 14
"""Rows of a table before its middle is left out."""


def evidence(view: View) -> View:
    """Register a view under its name."""
    EVIDENCE[view.__name__] = view
    return view


def table(head: Sequence[str], rows: Sequence[Sequence[object]], limit: int = ROWS) -> list[str]:
    """Right-aligned columns, but the last; the middle of a long table is left out."""
    shown: list[Sequence[object]] = list(rows)
    if len(shown) > limit:
        first = limit * 2 // 3
        shown = [
            *shown[:first],
            ["…"] * len(head),
            *shown[len(shown) - (limit - first - 1) :],
        ]
    cells = [[str(cell) for cell in row] for row in (head, *shown)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = []
    for row in cells:
        parts = [text.rjust(width) for text, width in zip(row[:-1], widths)]
        lines.append("  ".join([*parts, row[-1]]).rstrip()[:78])
    return lines


def ids(blocks: Sequence[int], limit: int = 8) -> str:
    """Block ids; runs of three and more are folded."""
    words: list[str] = []
    start = 0
    for i in range(1, len(blocks) + 1):
        if i < len(blocks) and blocks[i] == blocks[i - 1] + 1:
            continue
        run = blocks[start:i]
        words += [f"{run[0]}–{run[-1]}"] if len(run) > 2 else [str(b) for b in run]
        start = i
    if len(words) > limit:
        words = [*words[: limit - 1], "…"]
    return " ".join(words) or "none"


def ms(ns: int) -> str:
    return f"{ns / 1e6:.2f} ms"


# Configuration -----------------------------------------------------------------------------


@evidence
def settings(book: Book) -> list[str]:
    """What the engine decided before the first request."""
    config, backend = book.config, book.backends[0] if book.backends else None
    usable = config.num_blocks - 1
    lines = [
        f"vLLM {book.header.get('vllm')} on {book.header.get('platform')}",
        f"block size        {config.block_size} tokens",
        f"dtype             {config.settings['dtype']}, cache {config.settings['kv_cache_dtype']}"
        f" ({book.element_size} bytes an element)",
        f"blocks            {config.num_blocks}, one of them the null block: {usable} to use",
        f"one block         {book.page_bytes} bytes in each of {book.num_layers} layers",
        f"                  = 2 (K and V) x {config.block_size} tokens x {book.num_kv_heads} KV heads"
        f" x {book.head_size} x {book.element_size} bytes",
    ]
    if backend is None:
        return [*lines, "backend           not in this trace"]
    sizes = ", ".join(backend.settings.get("block_sizes", ())) or "any"
    lines += [f"backend           {backend.backend}, takes blocks of {sizes}"]
    for name, reason in backend.candidates:
        lines.append(f"  candidate       {name}: {reason or 'taken'}"[:78])
    return lines


@evidence
def layers(book: Book) -> list[str]:
    """Which layers called the attention kernel, step by step."""
    lines = [f"layer {b.layer}: {b.backend} ({b.impl})"[:78] for b in book.backends[:4]]
    rows = []
    for step in book.steps:
        if step.called:
            times = " ".join(f"{ns / 1000:.0f}" for ns in step.called.dur_ns)
            rows.append([step.number, step.num_tokens, len(step.called.dur_ns), times])
    total = sum(len(step.called.dur_ns) for step in book.steps if step.called)
    lines += ["", *table(["step", "tokens", "calls", "µs in each layer"], rows, 10)]
    return [*lines, f"{total} calls in {len(rows)} steps"]


# The pool and the tables -------------------------------------------------------------------


@evidence
def pool(book: Book) -> list[str]:
    """Blocks going out, and the queue before and after they come back."""
    rows = []
    for one in book.allocations:
        need = cdiv(one.num_tokens, book.block_size)
        rows.append(
            [
                one.event,
                book.name(one.request),
                one.num_tokens,
                need,
                one.free,
                ids(one.hits) + " hit, " + ids(one.new) + " new" if one.hits else ids(one.new),
            ]
        )
    lines = table(["event", "request", "tokens", "blocks", "free then", "got"], rows, 9)
    if book.freed:
        one = book.freed[0]
        marks = [f"{b}{'#' if h else ''}" for b, h in zip(one.blocks, one.hashed)]
        lines += [
            "",
            f"event {one.event}: blocks come back in this order (# has a hash):",
            f"  {' '.join(marks[:18])}",
            f"  queue before  {ids(one.queue_before, 12)}",
            f"  queue after   {ids(one.queue_after, 12)}",
            "  the head, on the left, is handed out next",
        ]
    for number, event in book.preempted[:1]:
        lines.append(
            f"event {number}: {book.name(event.request)} was preempted and gave up "
            f"{event.num_computed_tokens} computed tokens"
        )
    return lines


@evidence
def block_table(book: Book) -> list[str]:
    """The table that was just built, with who else holds each block."""
    one = max(book.allocations[:60], key=lambda a: (bool(a.hits), len(a.table)))
    step = next(s for s in book.steps if one.request in s.tables)
    owners: dict[int, int] = {}
    for row in step.tables.values():
        for block in row:
            owners[block] = owners.get(block, 0) + 1
    size, rows = book.block_size, []
    for logical, block in enumerate(one.table):
        last = min((logical + 1) * size, one.num_tokens) - 1
        rows.append(
            [
                logical,
                block,
                f"{logical * size}–{last}",
                f"{block * size}–{block * size + last % size}",
                f"hit, in {owners.get(block, 1)} tables" if block in one.hits else "new",
            ]
        )
    head = f"event {one.event}: the table of {book.name(one.request)}, {one.num_tokens} tokens"
    lines = [head, *table(["logical", "physical", "positions", "slots", "how"], rows, 10)]
    lines += ["", f"slot = table[position // {size}] * {size} + position % {size}"]
    return lines


# Kernels -----------------------------------------------------------------------------------


@evidence
def rule(book: Book) -> list[str]:
    """V1 or V2, step by step, and the numbers it was decided from."""
    kept, last = [], ""
    decodes = [step for step in book.steps if book.is_decode(step)]
    for i, step in enumerate(decodes):
        choice = book.chosen(step)
        changes = choice != last or (i + 1 < len(decodes) and book.chosen(decodes[i + 1]) != choice)
        if changes or i in (0, len(decodes) - 1):
            kept.append(step)
        last = choice
    rows = []
    for step in kept:
        longest, programs, parts = book.numbers_of_rule(step)
        own = f"{step.planned.kernel} {step.planned.variant}" if step.planned else "–"
        rows.append([step.number, longest, programs, parts, book.chosen(step), own])
    ran = any(book.paged_kernel(step) for step in decodes)
    head = (
        "the engine ran PagedAttention, and this is what it chose:"
        if ran
        else "what the rule of 0.11.2 would choose here (it did not run), and what ran:"
    )
    lines = [head]
    lines += table(
        ["step", "longest", "seqs x heads", "parts", "rule", "the kernel that ran"], rows
    )
    return [
        *lines,
        "",
        f"V1 if longest <= {MAX_V1} and (parts == 1 or seqs x heads > {PARTITION}), else V2",
        f"parts = longest / {PARTITION}, rounded up; {len(decodes)} decode steps in all",
    ]


@evidence
def chunks(book: Book) -> list[str]:
    """Each piece of a prompt: what is cached before it, what it adds."""
    rows = []
    for step in book.steps:
        for request, count in step.counts.items():
            before = step.before[request]
            if before >= book.arrived[request].num_prompt_tokens:
                continue
            total = book.arrived[request].num_prompt_tokens
            rows.append(
                [
                    step.number,
                    book.name(request),
                    before,
                    count,
                    f"{step.num_tokens} of {book.config.settings['max_num_batched_tokens']}",
                    "done" if before + count >= total else f"{total - before - count} left",
                ]
            )
    return table(["step", "request", "context", "new", "tokens in step", "prompt"], rows)


def _of_each_kind(book: Book) -> list[StepSeen]:
    """The last decode step of each choice."""
    last = {book.chosen(step): step for step in book.steps if book.is_decode(step)}
    return sorted(last.values(), key=lambda step: step.number)


@evidence
def grid(book: Book) -> list[str]:
    """How the CUDA kernels would be launched for steps of this trace."""
    lines = []
    for step in _of_each_kind(book):
        longest, _, parts = book.numbers_of_rule(step)
        seqs, padded = len(step.counts), cdiv(longest, book.block_size) * book.block_size
        if book.chosen(step) == "V1":
            lines += [
                f"step {step.number}, V1: {seqs} sequences, longest {longest}",
                f"  grid ({book.num_heads}, {seqs}, 1), 128 threads each",
                f"  shared memory {padded * 4} bytes: a float for each of {padded} tokens",
            ]
        else:
            lines += [
                f"step {step.number}, V2: {seqs} sequences, longest {longest}",
                f"  grid ({book.num_heads}, {seqs}, {parts}), 128 threads each",
                f"  shared memory {PARTITION * 4} bytes: a float for each of {PARTITION} tokens",
                f"  scratch: {seqs} x {book.num_heads} x {parts} sums, as many maxima,"
                f" and {book.head_size} times as many values",
                f"  then the reduce, grid ({book.num_heads}, {seqs})",
            ]
    return lines


@evidence
def walk(book: Book) -> list[str]:
    """The first loop of the kernel for one decode token: block by block through the table."""
    step = max(
        (s for s in book.steps if book.is_decode(s)), key=lambda s: (s.max_seq_len < 2000, s.number)
    )
    request = max(step.counts, key=lambda r: step.before[r])
    length, size, rows = step.before[request] + 1, book.block_size, []
    for logical in range(cdiv(length, size)):
        block = step.tables[request][logical]
        here = min(size, length - logical * size)
        rows.append([logical, block, here, logical * size // PARTITION, f"slot {block * size}"])
    lines = [f"step {step.number}: the new token of {book.name(request)} sees {length} tokens"]
    lines += table(["block_idx", "block_table[..]", "tokens", "partition", "begins at"], rows, 12)
    left = cdiv(length, size) * size - length
    return [*lines, "", f"the last block has {left} places that must not be read"]


@evidence
def writes(book: Book) -> list[str]:
    """Which slots a step wrote, and which blocks two requests hold without a copy."""
    lines, rows = [], []
    for step in book.steps[:5]:
        if step.mapped:
            slots = [slot for slot in step.mapped.slots if slot >= 0]
            rows.append([step.number, len(step.counts), len(slots), ids(slots, 6)])
    lines += table(["step", "requests", "tokens written", "slots"], rows)
    shared = {b: c for _, e in book.touched for b, c in zip(e.blocks, e.ref_cnts) if c > 1}
    lines += ["", f"blocks that several tables held at once: {ids(sorted(shared), 10)}"]
    step = next((s for s in book.steps if len(s.tables) > 1), book.steps[0])
    for request, row in list(step.tables.items())[:4]:
        lines.append(f"  {book.name(request)[:20]:20} {ids(row, 10)}")
    return [
        *lines,
        "  full blocks are shared, each tail is private: nothing had to be copied",
    ]


@evidence
def layout(book: Book) -> list[str]:
    """Where one element lies in the key cache of the CUDA kernels."""
    x = 16 // book.element_size
    size, heads = book.block_size, book.num_kv_heads
    lines = [
        f"an element has {book.element_size} bytes, so x = 16 / {book.element_size} = {x}",
        f"key cache    [blocks, {heads}, {book.head_size // x}, {size}, {x}]",
        f"value cache  [blocks, {heads}, {book.head_size}, {size}]",
        "",
        "strides of the key cache, in elements:",
        f"  block       {heads * book.head_size * size}",
        f"  head        {book.head_size * size}",
        f"  group of x  {size * x}",
        f"  token       {x}",
        "  element     1",
        "",
        f"reading element 0 of each token of a block touches every {x}th element;",
        f"a thread takes {x} at once: one load of 16 bytes",
    ]
    return lines


@evidence
def sizes(book: Book) -> list[str]:
    """The same memory with other element types."""
    usable = book.config.num_blocks - 1
    memory = usable * book.page_bytes
    rows = []
    for name, width in (("float32", 4), ("float16, bfloat16", 2), ("fp8, int8", 1)):
        page = book.page_bytes // book.element_size * width
        blocks = memory // page
        mark = "<- this run" if width == book.element_size else ""
        rows.append([name, width, page, blocks, blocks * book.block_size, mark])
    lines = [f"{memory} bytes a layer hold:"]
    lines += table(["element", "bytes", "a block", "blocks", "tokens", ""], rows)
    return [*lines, "", f"(the {usable} blocks of this run; K and V together, one layer)"]


@evidence
def timing(book: Book) -> list[str]:
    """Which steps took longest, and what the kernel's share was."""
    timed = [s for s in book.steps if s.executed and s.called]
    rows = []
    for step in sorted(timed, key=lambda s: -s.executed.forward_dur_ns)[:6]:
        kernel = sum(step.called.dur_ns)
        longest, programs, parts = book.numbers_of_rule(step)
        rows.append(
            [
                step.number,
                step.num_tokens,
                longest,
                ms(step.executed.forward_dur_ns),
                ms(kernel),
                f"{step.planned.variant}, {programs} x {parts}" if step.planned else "",
            ]
        )
    lines = table(["step", "tokens", "longest", "forward", "attention", "plan"], rows)
    forward = sum(s.executed.forward_dur_ns for s in timed)
    kernel = sum(sum(s.called.dur_ns) for s in timed)
    share = f"{100 * kernel / forward:.0f} %" if forward else "unknown"
    return [*lines, "", f"attention took {share} of the forward passes of {len(timed)} steps"]


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
    lines.append(
        "  " + ", ".join(f"{book.name(r)} {n}" for r, n in step.counts.items())[:70] + " tokens"
    )
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
    rows, last = [], set()
    for step in book.steps:
        now = set(step.counts)
        if now != last:
            came = ", ".join(book.name(r) for r in step.counts if r not in last)
            went = ", ".join(book.name(r) for r in sorted(last - now))
            rows.append(
                [step.number, len(now), step.num_tokens, f"+ {came} " * bool(came)]
                + [f"- {went}" if went else ""]
            )
        last = now
    merged = [[*row[:3], (row[3] + row[4]).strip()] for row in rows]
    return table(["step", "in the batch", "tokens", "who came, who went"], merged, 16)


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
        f"step {step.number}: {query} new tokens of {book.name(request)} see {context}",
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
        f"step {step.number}, {step.num_tokens} tokens, one layer:",
        f"  scores QK          {scores} bytes, written and read twice if not fused",
        f"  the output         {out} bytes",
        "",
        f"attention kernel calls in this trace: {calls} = {book.num_layers} layers x"
        f" {calls // max(1, book.num_layers)} steps",
        "  unfused (QK, scale, mask, softmax, V): five times as many launches",
        f"  the write to the cache is a kernel of its own: {calls} more",
    ]
