"""Questions about part 3's topics: GQA, FlashAttention, several GPUs, fusion."""

from __future__ import annotations

import random

from vllm_trace.learn.book import Book, cdiv
from vllm_trace.learn.questions import Question, many, question


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
        f"With {heads} KV heads (MHA) the memory holds {usable} blocks. How many with {many(kv, 'KV head')}?",
        str(usable * heads // kv),
        f"A block shrinks by {heads} / {kv} = {heads / kv:g}: {usable * heads // kv}.",
        ("A block's size goes with the KV heads.",),
        wrong={
            str(usable): "blocks get smaller, so more fit",
            str(usable * kv // heads): "more, not fewer",
        },
    )


@question
def bytes_read(book: Book, rng: random.Random) -> Question:
    step = rng.choice([s for s in book.steps if book.is_decode(s)] or book.steps)
    tokens = sum(step.before[r] + n for r, n in step.counts.items())
    each = 2 * book.head_size * book.element_size
    right = tokens * book.num_kv_heads * each
    return Question(
        f"In step {step.number} the sequences of the batch have {tokens} tokens together. How many bytes of "
        f"K and V does attention read in one layer, each once ({book.num_kv_heads} KV heads of "
        f"{book.head_size}, {book.element_size} bytes an element)?",
        str(right),
        f"{tokens} x 2 x {book.num_kv_heads} x {book.head_size} x {book.element_size} = {right}; with a KV head "
        f"for each of {book.num_heads} query heads it would be {tokens * book.num_heads * each}.",
        ("K and V of every token, for every KV head.",),
        wrong={
            str(right // 2): "K and V both",
            str(tokens * book.num_heads * each): "query heads of a group read the same keys",
            str(tokens * each): "that is one KV head",
        },
        look=f"steps --step {step.number}",
    )


@question
def scale_bytes(book: Book, rng: random.Random) -> Question:
    step = rng.choice(book.steps)
    request = rng.choice(list(step.counts))
    length = step.before[request] + step.counts[request]
    right = length * 2 * book.num_kv_heads * 4
    return Question(
        f"After step {step.number} the cache has {many(length, 'token')} of {book.name(request)}. With int8 and "
        f"a float scale (4 bytes) for each token and KV head, of K and V apart: how many bytes of scales "
        f"is that in one layer?",
        str(right),
        f"{length} x {book.num_kv_heads} x 2 x 4 = {right}, beside {length * 2 * book.num_kv_heads * book.head_size} "
        f"of int8 values.",
        ("A scale for K and one for V, in every KV head.",),
        wrong={
            str(right // 2): "K and V have scales of their own",
            str(right // 4): "scales, not bytes: each has 4",
            str(length * 8): "every KV head has its own",
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
        f"In step {step.number} the tables of {many(len(step.tables), 'request')} have {held} entries. How many "
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
        f"In step {step.number}, {many(query, 'token')} of {book.name(request)} attended to {context} keys with "
        f"{heads} heads. How many bytes of scores (float32) would be written if attention were not fused?",
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
    first = rng.randrange(max(1, len(book.steps) - 9))
    some = book.steps[first : first + rng.randrange(2, 9)]
    calls = len(some) * book.num_layers
    return Question(
        f"Steps {some[0].number} to {some[-1].number} called the attention kernel {calls} times. If it were "
        f"five kernels (QK, scale, mask, softmax, V), how many more launches would that be?",
        str(calls * 4),
        f"5 x {calls} instead of {calls}: {calls * 4} more.",
        ("One of the five would be launched anyway.",),
        wrong={
            str(calls * 5): "that is all of them; the one kernel is launched too",
            "4": "that is for one call",
        },
    )


@question
def fused_writes(book: Book, rng: random.Random) -> Question:
    step = rng.choice(book.steps)
    elements = step.num_tokens * book.num_heads * book.head_size
    width = book.element_size
    return Question(
        f"Step {step.number} computes {many(step.num_tokens, 'token')}; the output of attention has {elements} "
        f"elements of {width} bytes in a layer. If attention writes it as fp8 at once, how many bytes are "
        f"written instead of {elements * width}?",
        str(elements),
        f"One byte for each: {elements}; without fusion a second kernel would read and write it again.",
        ("fp8 has one byte.",),
        wrong={str(elements * width): "that is without fp8"},
    )
