"""What a trace shows for each step, as lines of at most 78 characters for a terminal.

Each function takes a ``Book`` and returns lines; ``EVIDENCE`` names them for ``steps/*.toml``.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

from vllm_trace.decode_rule import MAX_V1_SEQ_LEN as MAX_V1
from vllm_trace.decode_rule import PARTITION_SIZE as PARTITION
from vllm_trace.learn.book import Book, StepSeen, cdiv
from vllm_trace.learn.questions import many

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
    lines = [f"{b.backend}  {b.layer}"[:78] for b in book.backends[:4]]
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
        back = book.freed[0]
        marks = [f"{b}{'#' if h else ''}" for b, h in zip(back.blocks, back.hashed)]
        lines += [
            "",
            f"event {back.event}: blocks come back in this order (# has a hash):",
            f"  {' '.join(marks[:18])}",
            f"  queue before  {ids(back.queue_before, 12)}",
            f"  queue after   {ids(back.queue_after, 12)}",
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
        own = step.planned.variant if step.planned else "–"
        rows.append([step.number, longest, programs, parts, book.chosen(step), own])
    ran = any(book.paged_kernel(step) for step in decodes)
    head = (
        "the engine ran PagedAttention, and this is what it chose:"
        if ran
        else "what the rule of 0.11.2 would choose here (it did not run), and what ran:"
    )
    lines = [head]
    lines += table(["step", "longest", "seqs x heads", "parts", "rule", "what ran"], rows)
    kernels = dict.fromkeys(step.planned.kernel for step in kept if step.planned)
    lines += textwrap.wrap(f"variants of {', '.join(kernels)}", 78) if kernels else []
    reasons = [str(getattr(step.planned, "reason", "")) for step in kept if step.planned]
    for reason in filter(None, dict.fromkeys(reasons[-2:])):
        lines += textwrap.wrap(f"recorded: {reason}", 78, subsequent_indent="  ")[:2]
    return [
        *lines,
        "",
        f"V1 if longest <= {MAX_V1} and (parts == 1 or seqs x heads > {PARTITION}), else V2",
        f"parts = longest / {PARTITION}, rounded up; {many(len(decodes), 'decode step')} in all",
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
    outputs = (
        2 * book.head_size * 4
    )  # two of the four warps leave their part of the output to the others
    for step in _of_each_kind(book):
        longest, _, parts = book.numbers_of_rule(step)
        seqs, padded = len(step.counts), cdiv(longest, book.block_size) * book.block_size
        if book.chosen(step) == "V1":
            lines += [
                f"step {step.number}, V1: {many(seqs, 'sequence')}, longest {longest}",
                f"  grid ({book.num_heads}, {seqs}, 1), 128 threads each",
                f"  shared memory {max(padded * 4, outputs)} bytes: a float for each of {padded} tokens,"
                f" or {outputs} for outputs",
            ]
        else:
            lines += [
                f"step {step.number}, V2: {many(seqs, 'sequence')}, longest {longest}",
                f"  grid ({book.num_heads}, {seqs}, {parts}), 128 threads each",
                f"  shared memory {max(PARTITION * 4, outputs)} bytes: a float for each of {PARTITION} tokens",
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
    timed = [
        (step, step.executed.forward_dur_ns, sum(step.called.dur_ns))
        for step in book.steps
        if step.executed and step.called
    ]
    rows = []
    for step, forward, kernel in sorted(timed, key=lambda each: -each[1])[:6]:
        longest, programs, parts = book.numbers_of_rule(step)
        rows.append(
            [
                step.number,
                step.num_tokens,
                longest,
                ms(forward),
                ms(kernel),
                f"{step.planned.variant}, {programs} x {parts}" if step.planned else "",
            ]
        )
    lines = table(["step", "tokens", "longest", "forward", "attention", "plan"], rows)
    forward = sum(each[1] for each in timed)
    kernel = sum(each[2] for each in timed)
    share = f"{100 * kernel / forward:.0f} %" if forward else "unknown"
    return [*lines, "", f"attention took {share} of the forward passes of {len(timed)} steps"]
