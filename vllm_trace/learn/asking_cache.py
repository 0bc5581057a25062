"""Questions about the cache: what is written and copied, where an element lies, what it takes in fewer bits."""

from __future__ import annotations

import random

from vllm_trace.learn.book import Book, cdiv
from vllm_trace.learn.questions import Question, many, question


@question
def slots_written(book: Book, rng: random.Random) -> Question:
    step = rng.choice(book.steps)
    count = step.num_tokens
    return Question(
        f"Step {step.number} has {many(len(step.counts), 'request')} with {many(count, 'token')} in all. Into how many "
        f"slots does reshape_and_cache write in one layer?",
        str(count),
        f"One for each new token, of prompts and of decodes alike: {count}.",
        ("Each token that is computed has a slot.",),
        wrong={
            str(len(step.counts)) if len(step.counts) != count else "-1":
                "one for each token, not for each request",
            str(count * book.num_layers): "that is all layers",
        },
        look=f"events --step {step.number} --kind slots.mapped",
    )  # fmt: skip


@question
def copies_needed(book: Book, rng: random.Random) -> Question:
    size, request = book.block_size, rng.choice(list(book.arrived))
    prompt, answers = book.arrived[request].num_prompt_tokens, rng.randrange(2, 8)
    shared = (prompt - 1) // size
    own = cdiv(prompt, size) - shared
    tail = prompt - shared * size
    return Question(
        f"{answers} answers to the prompt of request {book.name(request)} ({prompt} tokens) are generated side "
        f"by side. They share what blocks of {size} they can. How many blocks are in use when all prompts are "
        f"computed?",
        str(shared + answers * own),
        f"{shared} shared, and {answers} tails of {tail} tokens: {shared + answers * own}. Nothing was copied.",
        ("How many full blocks stand before the prompt's last token?", "Each writes on in its last block."),
        wrong={
            str((shared + own) * answers): "that is without sharing",
            str(shared + own): "each writes its own next tokens: the tail cannot be shared",
            str(shared): "the tails count too",
        },
        look="requests",
    )  # fmt: skip


@question
def fork_copies(book: Book, rng: random.Random) -> Question:
    step = max(book.steps, key=lambda s: len(s.counts))
    owners = rng.randrange(2, max(3, len(step.counts) + 1))
    return Question(
        f"V0 would have forked {owners} of the requests of step {step.number} from one, and they would hold "
        f"one partly filled block together. Each of them generates a token now. How many copies of the "
        f"block does copy-on-write make?",
        str(owners - 1),
        f"Whoever writes while others hold it copies; the last one is alone and writes in place: "
        f"{owners - 1}.",
        ("Who is alone with a block may write to it.",),
        wrong={str(owners): "the last one is its only owner by then", "1": "each of them writes"},
    )


@question
def vector_x(book: Book, rng: random.Random) -> Question:
    width = rng.choice([1, 2, 4])
    name = {1: "fp8", 2: "float16", 4: "float32"}[width]
    return Question(
        f"A thread loads 16 bytes of keys at once. With a cache of {name}, what is x, the number of "
        f"elements that stand side by side?",
        str(16 // width),
        f"16 / {width} bytes = {16 // width}.",
        ("How many bytes has an element?",),
        wrong={"16": "bytes, not elements"} if width > 1 else {"1": "one byte each: 16 of them"},
    )


@question
def key_offset(book: Book, rng: random.Random) -> Question:
    x, size, head = 16 // book.element_size, book.block_size, rng.randrange(book.num_kv_heads)
    said, block, place = _written(book, rng)
    each = book.head_size * size
    begin = (block * book.num_kv_heads + head) * each
    offset = begin + place * x
    return Question(
        f"{said} The key cache is [blocks, {book.num_kv_heads}, {book.head_size // x}, {size}, {x}]. At which "
        f"element does the token's key of KV head {head} begin (all count from 0)?",
        str(offset),
        f"{block} x {book.num_kv_heads * each} + {head} x {each} + {place} x {x} = {offset}.",
        (
            f"A block has {book.num_kv_heads * each} elements, a head in it {each}.",
            f"Two tokens are {x} elements apart.",
        ),
        wrong={
            str(begin + place): f"tokens are {x} elements apart, not 1",
            str(begin + place * book.head_size): "that is the layout [block, head, token, dim]",
            str(head * each + place * x): "and the blocks before it?",
            str(block * book.num_kv_heads * each + place * x): "and the heads before it?",
        },
    )


def _written(book: Book, rng: random.Random) -> tuple[str, int, int]:
    """Where a step wrote a token: in words, block, place."""
    step = rng.choice([s for s in book.steps if s.mapped] or book.steps)
    size = book.block_size
    if tokens := [token for token in step.tokens() if token.slot >= 0]:
        token = rng.choice(tokens)
        block, place = divmod(token.slot, size)
        who = f"position {token.position} of {book.name(token.request)}"
    else:
        block, place = rng.randrange(1, max(2, book.config.num_blocks)), rng.randrange(size)
        who = "a token"
    said = f"Step {step.number} wrote {who} to slot {block * size + place}: block {block}, place {place}."
    return said, block, place


@question
def fp8_blocks(book: Book, rng: random.Random) -> Question:
    width, step = book.element_size, rng.choice(book.steps)
    free = step.scheduled.num_free_blocks or book.config.num_blocks - 1
    return Question(
        f"When step {step.number} was scheduled, {many(free, 'block')} {'was' if free == 1 else 'were'} free, "
        f"with {width} bytes an element. How many fp8 blocks would the same memory hold?",
        str(free * width),
        f"An element shrinks from {width} bytes to 1: {free} x {width} = {free * width}.",
        ("fp8 has one byte.",),
        wrong={
            str(free): "blocks are smaller then, so more of them fit",
            str(free // width): "more, not fewer",
        },
    )


@question
def value_offset(book: Book, rng: random.Random) -> Question:
    size, kv, dim = book.block_size, book.num_kv_heads, book.head_size
    said, block, place = _written(book, rng)
    element = rng.randrange(1, dim)
    begin = block * kv * dim * size
    offset = begin + element * size + place
    return Question(
        f"{said} The value cache is [blocks, {kv}, {dim}, {size}]. At which place in it is element {element} "
        f"of the token's value in KV head 0 (all count from 0)?",
        str(offset),
        f"{block} x {kv * dim * size} + {element} x {size} + {place} = {offset}.",
        (f"A block has {kv * dim * size} elements.", "Tokens are innermost: one apart."),
        wrong={
            str(begin + place * dim + element): "here tokens are innermost",
            str(element * size + place): "and the blocks before it?",
        },
    )


@question
def fp8_bytes(book: Book, rng: random.Random) -> Question:
    context = rng.choice(book.steps).max_seq_len
    each = 2 * book.num_kv_heads * book.head_size * book.num_layers
    return Question(
        f"How many bytes do the K and V of {context} tokens take with fp8, in all {book.num_layers} "
        f"layers ({book.num_kv_heads} KV heads of {book.head_size}; scales aside)?",
        str(context * each),
        f"2 x {book.num_kv_heads} x {book.head_size} x {book.num_layers} = {each} for a token; "
        f"x {context} = {context * each}.",
        ("First one token: K and V, all KV heads, all layers.",),
        wrong={
            str(context * each * book.element_size): f"that is with {book.element_size} bytes",
            str(context * each // 2): "K and V both",
            str(context * each // book.num_layers): "that is one layer",
        },
    )


@question
def fp8_scale(book: Book, rng: random.Random) -> Question:
    times = rng.randrange(2, 9)
    return Question(
        f"The largest key of a layer is {448 * times}, FP8 (e4m3) reaches 448. By which whole number must "
        f"keys be divided at least, so that none is clipped?",
        str(times),
        f"{448 * times} / 448 = {times}: that is k_scale.",
        ("Largest value over largest number of the format.",),
        wrong={str(448 * times): "that would make it 1", "448": "that is the format's range"},
    )
