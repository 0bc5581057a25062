"""Questions about kernels: the V1/V2 rule, chunks, launches, layouts, bytes."""

from __future__ import annotations

import random

from vllm_trace.learn.book import MAX_V1, PARTITION, Book, StepSeen, cdiv
from vllm_trace.learn.questions import Question, many, question


def _decode(book: Book, rng: random.Random) -> StepSeen:
    steps = [s for s in book.steps if book.is_decode(s)] or book.steps
    both = {book.chosen(s): [t for t in steps if book.chosen(t) == book.chosen(s)] for s in steps}
    return rng.choice(both[rng.choice(sorted(both))])


# The rule ----------------------------------------------------------------------------------


@question
def v1_or_v2(book: Book, rng: random.Random) -> Question:
    step = _decode(book, rng)
    longest, programs, parts = book.numbers_of_rule(step)
    right = book.chosen(step)
    if longest > MAX_V1:
        why = f"{longest} is above {MAX_V1}, where V1's logits no longer fit shared memory"
    elif parts == 1:
        why = f"{longest} tokens are one partition of {PARTITION}: nothing to split"
    else:
        why = f"{parts} partitions, and {programs} programs are " + (
            "plenty" if programs > PARTITION else f"not above {PARTITION}: splitting fills the GPU"
        )
    return Question(
        f"Decode step {step.number}: the longest sequence has {longest} tokens, sequences x heads is "
        f"{programs}. Does the rule of 0.11.2 say V1 or V2?",
        right,
        f"{right}: {why}.",
        (
            f"How many partitions of {PARTITION} are {longest} tokens?",
            f"V1 if longest <= {MAX_V1} and (one partition or more than {PARTITION} programs).",
        ),
        choices=("V1", "V2"),
        wrong={
            ("V2" if right == "V1" else "V1"):
                "one partition leaves nothing to merge" if right == "V1" else
                "one program for each sequence and head would leave most of a GPU idle"
                if longest <= MAX_V1 else "that many logits do not fit V1's shared memory",
        },
        look=f"events --step {step.number} --kind attention.planned",
    )  # fmt: skip


@question
def partitions(book: Book, rng: random.Random) -> Question:
    step = max((s for s in book.steps), key=lambda s: (s.max_seq_len, rng.random()))
    longest = rng.choice([step.max_seq_len, book.steps[rng.randrange(len(book.steps))].max_seq_len])
    count = max(1, cdiv(longest, PARTITION))
    rest = longest - (count - 1) * PARTITION
    return Question(
        f"A sequence has {longest} tokens. Into how many partitions of {PARTITION} does V2 cut it?",
        str(count),
        f"{longest} / {PARTITION}, rounded up: {count}; the last has {rest} tokens.",
        ("A begun partition is a partition.",),
        wrong={
            str(longest // PARTITION): "the last, partly filled one counts",
            str(count + 1): f"{PARTITION} x {count} is enough already",
        },
    )


@question
def when_v2(book: Book, rng: random.Random) -> Question:
    programs = book.num_heads * rng.choice((1, 2, 3, 4, 6, 8))
    limit = PARTITION // programs + 1
    longest = PARTITION + rng.randrange(1, 3 * PARTITION)
    return Question(
        f"A model with {programs} heads decodes sequences of {longest} tokens. From how many sequences "
        f"on does the rule go back to V1?",
        str(limit),
        f"It needs more than {PARTITION} programs: {limit} x {programs} = {limit * programs}; "
        f"{limit - 1} x {programs} = {(limit - 1) * programs} is not above.",
        (f"sequences x {programs} must be above {PARTITION}.",),
        wrong={
            str(
                limit - 1
            ): f"that gives {(limit - 1) * programs}, and the rule says above, not from",
            str(PARTITION): "programs, not sequences: every sequence has all heads",
        },
    )


# Prefill -----------------------------------------------------------------------------------


def _chunks(book: Book) -> dict[int, list[tuple[StepSeen, int, int]]]:
    """Request → (step, tokens before, tokens) of its prompt; of one that was preempted only the first time."""
    made: dict[int, list[tuple[StepSeen, int, int]]] = {}
    for step in book.steps:
        for request, count in step.counts.items():
            before, parts = step.before[request], made.setdefault(request, [])
            done = parts[-1][1] + parts[-1][2] if parts else 0
            if done < book.arrived[request].num_prompt_tokens and (before >= done or not parts):
                parts.append((step, before, count))
    return made


@question
def prompt_left(book: Book, rng: random.Random) -> Question:
    made = _chunks(book)
    request = rng.choice(list(made))
    place = rng.randrange(len(made[request]))
    step, before, count = made[request][place]
    prompt = book.arrived[request].num_prompt_tokens
    sizes = ", ".join(str(n) for *_, n in made[request][: place + 1])
    left = prompt - before - count
    return Question(
        f"The prompt of {book.name(request)} has {prompt} tokens; its chunks up to step {step.number} had "
        f"{sizes}. How many tokens of it are left to compute?",
        str(left),
        f"{before} before this step, {count} in it: {prompt} - {before + count} = {left}.",
        ("Add its chunks up.", "The column 'prompt' of the evidence has it."),
        wrong={
            str(prompt - count): "earlier chunks are done too",
            str(prompt - before): "and what this step computes?",
        },
        look=f"steps --request {book.name(request)}",
    )


@question
def chunk_context(book: Book, rng: random.Random) -> Question:
    made = [(r, part) for r, parts in _chunks(book).items() for part in parts[1:]]
    if not made:
        made = [(r, parts[0]) for r, parts in _chunks(book).items()]
    request, (step, before, count) = rng.choice(made)
    return Question(
        f"In step {step.number} a chunk of {count} tokens of {book.name(request)} follows {before} that "
        f"are cached. How many keys does the chunk's last token attend to?",
        str(before + count),
        f"The {before} cached ones and all {count} of the chunk, itself included: {before + count}.",
        ("A token attends to itself too.", "What is cached, and the chunk up to itself."),
        wrong={
            str(before + count - 1): "it attends to itself too",
            str(count): "earlier chunks are read from the cache",
            str(before): "the chunk's own keys count too: they are in the cache by then",
        },
        look=f"events --step {step.number} --kind slots.mapped",
    )


@question
def budget_left(book: Book, rng: random.Random) -> Question:
    budget = int(book.config.settings["max_num_batched_tokens"])
    steps = [s for s in book.steps if len(s.counts) > 1] or book.steps
    step = rng.choice(steps)
    ones = sum(1 for n in step.counts.values() if n == 1)
    return Question(
        f"In step {step.number}, {many(ones, 'request')} of {len(step.counts)} had one token to compute. A step "
        f"may have {budget} tokens. How many were left for chunks of prompts?",
        str(budget - ones),
        f"{budget} - {ones} = {budget - ones}; those who run are served first.",
        ("Each of them takes one token of the budget.",),
        wrong={
            str(budget): "those who decode come first and take their share",
            str(max(0, budget - step.num_tokens)): "that is what nobody used in the end",
        },
        look=f"steps --step {step.number}",
    )


# Launches and loops ------------------------------------------------------------------------


@question
def grid_size(book: Book, rng: random.Random) -> Question:
    step = _decode(book, rng)
    longest, programs, parts = book.numbers_of_rule(step)
    two = book.chosen(step) == "V2"
    blocks = programs * (parts if two else 1)
    return Question(
        f"Decode step {step.number} runs {book.chosen(step)}: {many(len(step.counts), 'sequence')}, "
        f"{book.num_heads} heads, longest {longest}. How many thread blocks has the grid?",
        str(blocks),
        (
            f"{book.num_heads} heads x {len(step.counts)} sequences x {parts} partitions = {blocks}."
            if two
            else f"{book.num_heads} heads x {len(step.counts)} sequences x 1 = {blocks}."
        ),
        ("Heads, sequences, and with V2 partitions.",),
        wrong={
            str(blocks * 128): "those are threads; a block has 128",
            str(programs if two else programs * parts + (parts == 1)):
                "V2 has a third dimension" if two else "V1 does not divide the context",
            str(len(step.counts)): "each head has a thread block of its own",
        },
    )  # fmt: skip


@question
def shared_memory(book: Book, rng: random.Random) -> Question:
    size = book.block_size
    longest = rng.choice(book.steps).max_seq_len
    if longest > MAX_V1:
        longest = MAX_V1 - rng.randrange(1, 100)
    padded = cdiv(longest, size) * size
    return Question(
        f"V1 keeps one float (4 bytes) for every token of the longest sequence, {longest}, rounded up to "
        f"whole blocks of {size}. How many bytes of shared memory are that?",
        str(padded * 4),
        f"{longest} rounded up is {padded}; x 4 = {padded * 4}.",
        ("First round up to blocks.", "Then 4 bytes for each."),
        wrong={
            str(longest * 4): "rounded up to whole blocks first",
            str(padded): "tokens, not bytes",
        },
    )


@question
def last_block(book: Book, rng: random.Random) -> Question:
    step = _decode(book, rng)
    request = rng.choice(list(step.counts))
    length, size = step.before[request] + 1, book.block_size
    inside = (length - 1) % size + 1
    return Question(
        f"In step {step.number} the new token of {book.name(request)} sees {length} tokens. How many of "
        f"them are in its last block (blocks of {size})?",
        str(inside),
        f"{length} = {(length - 1) // size} x {size} + {inside}.",
        ("What is left after the full blocks?",),
        wrong={
            "0": "a block without a token would not be in the table",
            str(size - inside): "those are the places that must not be read",
            str(inside - 1): "the new token is in it too",
        },
    )


@question
def blocks_read(book: Book, rng: random.Random) -> Question:
    step = _decode(book, rng)
    request = rng.choice(list(step.counts))
    length, size = step.before[request] + 1, book.block_size
    per = cdiv(length, size)
    return Question(
        f"In step {step.number} {book.name(request)} has {length} tokens in blocks of {size}. How often "
        f"does the first loop (Q times K) of one head look into the block table?",
        str(per),
        f"Once for each block: {length} / {size} rounded up = {per}. The second loop (V) does it again.",
        ("Once for each block that holds a token.",),
        wrong={
            str(length): "once for each block, not for each token",
            str(per * 2): "that is both loops",
            str(length // size): "the last block is read too",
        },
    )


@question
def merge_weight(book: Book, rng: random.Random) -> Question:
    low, high = rng.randrange(1, 4), rng.randrange(5, 8)
    first_bigger = rng.random() < 0.5
    name = "first" if first_bigger else "second"
    a, b = (high, low) if first_bigger else (low, high)
    return Question(
        f"V2's reduce merges two partitions with maxima {a} and {b} and equal sums of exponentials. "
        f"Which has the larger weight?",
        name,
        f"Sums are relative to their own maximum: exp({a} - {high}) against exp({b} - {high}).",
        ("A sum was taken relative to its own maximum.",),
        choices=("first", "second", "equal"),
        wrong={"equal": "equal sums, but each relative to its own maximum: they must be rescaled"},
    )


@question
def merge_share(book: Book, rng: random.Random) -> Question:
    split = [s for s in book.steps if book.is_decode(s) and s.max_seq_len > PARTITION]
    length = rng.choice(split).max_seq_len if split else PARTITION + rng.randrange(8, PARTITION)
    parts = cdiv(length, PARTITION)
    last = length - (parts - 1) * PARTITION
    share = round(100 * last / length)
    return Question(
        f"V2 cuts the {length} tokens of a sequence into partitions of {PARTITION}. If all logits were equal, "
        f"how many per cent (to the nearest whole) would the last partition's output weigh in the reduce?",
        str(share),
        f"Every token weighs the same, and it has {last} of {length}: {100 * last / length:.1f} %.",
        ("How many tokens has the last partition?", "With equal logits a sum is the number of tokens."),
        wrong={
            str(round(100 / parts)): "partitions weigh by their sums, and the last one has fewer tokens",
            str(last): "that is its tokens: of how many?",
        },
    )  # fmt: skip


# The cache ---------------------------------------------------------------------------------


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


# What a step took --------------------------------------------------------------------------


@question
def slowest_step(book: Book, rng: random.Random) -> Question:
    timed = [s for s in book.steps if s.executed]
    some = rng.sample(timed, min(4, len(timed)))
    some.sort(key=lambda s: s.number)
    slow = max(some, key=lambda s: s.executed.forward_dur_ns)  # type: ignore[union-attr]
    took = {s.number: s.executed.forward_dur_ns / 1e6 for s in some}  # type: ignore[union-attr]
    return Question(
        f"Which of the steps {', '.join(map(str, took))} had the longest forward pass on this machine?",
        str(slow.number),
        ", ".join(f"step {n}: {t:.2f} ms" for n, t in took.items()) + ".",
        ("More tokens mean more work.", "The column 'forward' has it."),
        choices=tuple(map(str, took)),
        look="steps --all",
    )
