"""Questions about kernels: the V1/V2 rule, chunks, launches, loops."""

from __future__ import annotations

import random

from vllm_trace.decode_rule import MAX_V1_SEQ_LEN as MAX_V1
from vllm_trace.decode_rule import PARTITION_SIZE as PARTITION
from vllm_trace.learn.book import Book, StepSeen, cdiv
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
