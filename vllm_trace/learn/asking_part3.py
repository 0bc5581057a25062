"""Questions about part 3's topics: GQA, FlashAttention, several GPUs, fusion."""

from __future__ import annotations

import random

from vllm_trace.learn.book import Book, cdiv
from vllm_trace.learn.questions import Question, question


@question
def kv_head_of(book: Book, rng: random.Random) -> Question:
    times, kv = rng.choice([2, 4, 8]), rng.choice([2, 4, 8])
    total = kv * times
    head = rng.randrange(total)
    return Question(
        f"A model has {total} query heads and {kv} KV heads. Which KV head does query head {head} read "
        f"(both count from 0)?",
        str(head // times),
        f"{total} / {kv} = {times} neighbours share one: {head} // {times} = {head // times}.",
        ("How many query heads share a KV head?",),
        wrong={
            str(head % kv): "neighbours share one: it is a division, not a remainder",
            str(head): "that is the query head",
            str(head // times + 1): "they count from 0",
        },
    )


@question
def gqa_saves(book: Book, rng: random.Random) -> Question:
    heads = book.num_heads * rng.choice([1, 2, 4])
    kv = rng.choice([k for k in (1, 2, 4) if k < heads])
    usable = book.config.num_blocks - 1
    return Question(
        f"With {heads} KV heads (MHA) the memory holds {usable} blocks. How many with {kv} KV head(s)?",
        str(usable * heads // kv),
        f"A block shrinks by {heads} / {kv} = {heads / kv:g}: {usable * heads // kv}.",
        ("A block's size goes with the KV heads.",),
        wrong={
            str(usable): "blocks get smaller, so more fit",
            str(usable * kv // heads): "more, not fewer",
        },
    )


@question
def num_tiles(book: Book, rng: random.Random) -> Question:
    step = rng.choice(book.steps)
    context, tile = step.max_seq_len, rng.choice([16, 32, 64])
    count = cdiv(context, tile)
    return Question(
        f"FlashAttention goes through {context} keys in tiles of {tile}. How many tiles are that?",
        str(count),
        f"{context} / {tile}, rounded up: {count}.",
        ("The last tile may be partly empty.",),
        wrong={str(context // tile): "the rest is a tile too", str(count + 1): "one too many"},
    )


@question
def rescale(book: Book, rng: random.Random) -> Question:
    maxima = [rng.randrange(1, 9) for _ in range(5)]
    so_far, times = maxima[0], 0
    for value in maxima[1:]:
        times += value > so_far
        so_far = max(so_far, value)
    return Question(
        f"The largest logits of five tiles are {', '.join(map(str, maxima))}. How often does a running "
        f"softmax meet a new maximum after the first tile, and must rescale what it has?",
        str(times),
        "Each time a tile's maximum is above all before it.",
        ("Keep the largest so far beside you.",),
        wrong={"4": "only when the maximum grows", str(times + 1): "the first tile has nothing to rescale"},
    )  # fmt: skip


@question
def bytes_of_rank(book: Book, rng: random.Random) -> Question:
    ranks, times = rng.choice([2, 4]), rng.choice([1, 2, 4])
    kv = book.num_kv_heads * ranks * times
    page = book.page_bytes * ranks * times
    return Question(
        f"A model has {kv} KV heads, and a block takes {page} bytes in a layer. How many bytes does it "
        f"take on each of {ranks} tensor-parallel ranks?",
        str(page // ranks),
        f"Each rank has {kv // ranks} of {kv} heads: {page} / {ranks} = {page // ranks}.",
        ("Each rank has its heads of every block.",),
        wrong={str(page): "each rank has only some of the heads"},
    )


@question
def blocks_of_ranks(book: Book, rng: random.Random) -> Question:
    usable = book.config.num_blocks
    ranks = [usable + rng.randrange(0, 40) for _ in range(4)]
    return Question(
        f"Four ranks have room for {', '.join(map(str, ranks))} blocks. How many does the engine have?",
        str(min(ranks)),
        f"One table for all: the smallest count, {min(ranks)}.",
        ("A block id must be there on each rank.",),
        wrong={
            str(sum(ranks)): "every block is on every rank, with other heads",
            str(max(ranks)): "the others do not have that many",
        },
    )


@question
def tables_of_ranks(book: Book, rng: random.Random) -> Question:
    ranks, step = rng.choice([2, 4, 8]), rng.choice(book.steps)
    held = sum(len(table) for table in step.tables.values())
    return Question(
        f"In step {step.number} the tables of {len(step.tables)} request(s) have {held} entries. How many "
        f"block ids does the scheduler keep for them with {ranks} tensor-parallel ranks?",
        str(held),
        f"The same {held}: an id names the block on every rank, with that rank's heads in it.",
        ("Does the table of a request differ between ranks?",),
        wrong={
            str(held * ranks): "all ranks use the same ids",
            str(held // ranks): "ranks divide heads, not blocks",
        },
    )


@question
def score_bytes(book: Book, rng: random.Random) -> Question:
    step = rng.choice([s for s in book.steps if max(s.counts.values()) > 1] or book.steps)
    request = max(step.counts, key=lambda r: step.counts[r])
    query, context = step.counts[request], step.before[request] + step.counts[request]
    heads = book.num_heads
    return Question(
        f"In step {step.number}, {query} tokens of {book.name(request)} see {context} keys with {heads} "
        f"heads. How many bytes of scores (float32) would be written if attention were not fused?",
        str(query * context * heads * 4),
        f"{query} x {context} x {heads} x 4 = {query * context * heads * 4}.",
        ("A score for each query, key and head.",),
        wrong={
            str(query * context * heads): "4 bytes each",
            str(query * context * 4): "each head has scores of its own",
        },
    )


@question
def launches(book: Book, rng: random.Random) -> Question:
    layers, parts = rng.randrange(2, 41), 5
    return Question(
        f"Attention as five kernels (QK, scale, mask, softmax, V) instead of one, in a model of {layers} "
        f"layers: how many launches does a step save when they are fused?",
        str(layers * (parts - 1)),
        f"{layers} x 5 - {layers} x 1 = {layers * (parts - 1)}.",
        ("The fused one is launched too.",),
        wrong={str(layers * parts): "one for each layer is left", str(parts - 1): "in every layer"},
    )


@question
def fused_writes(book: Book, rng: random.Random) -> Question:
    step = rng.choice(book.steps)
    elements = step.num_tokens * book.num_heads * book.head_size
    width = book.element_size
    return Question(
        f"Step {step.number} computes {step.num_tokens} tokens; the output of attention has {elements} "
        f"elements of {width} bytes in a layer. If attention writes it as fp8 at once, how many bytes are "
        f"written instead of {elements * width}?",
        str(elements),
        f"One byte for each: {elements}; without fusion a second kernel would read and write it again.",
        ("fp8 has one byte.",),
        wrong={str(elements * width): "that is without fp8"},
    )
