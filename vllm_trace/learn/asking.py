"""Questions about configuration, blocks, tables and the queue."""

from __future__ import annotations

import random

from vllm_trace.learn.book import Allocation, Book, StepSeen, cdiv
from vllm_trace.learn.questions import Question, many, question


def position_of(book: Book, rng: random.Random) -> tuple[StepSeen, int, int]:
    """(step, request, position) of some token that was computed, not in the first block if it can be."""
    step = rng.choice([s for s in book.steps if s.mapped] or book.steps)
    request = rng.choice(list(step.counts))
    length = step.before[request] + step.counts[request]
    low = book.block_size if length > book.block_size else 0
    return step, request, rng.randrange(low, length)


# Configuration -----------------------------------------------------------------------------


@question
def usable_blocks(book: Book, rng: random.Random) -> Question:
    total, size = book.config.num_blocks, book.block_size
    need = rng.randrange(1, min(12, total - 1))
    tokens = need * size - rng.randrange(size)
    return Question(
        f"The pool has {total} blocks of {size}. One request runs, with {tokens} tokens. How many blocks "
        f"are free?",
        str(total - 1 - need),
        f"{total} less the null block, which is never given out, less {tokens} / {size} rounded up = "
        f"{need}: {total - 1 - need}.",
        (
            "One block is set aside when the pool is made.",
            "A block that is begun is a whole block.",
        ),
        wrong={
            str(total - need): "one of them is the null block; it stands in tables, nobody owns it",
            str(total - 1 - tokens // size): "the last block counts, however few tokens are in it",
        },
    )


@question
def capacity_tokens(book: Book, rng: random.Random) -> Question:
    usable, size = book.config.num_blocks - 1, book.block_size
    most = max(1, usable // 2)
    tokens = rng.randrange(1, most) * size + rng.randrange(1, size) if most > 1 else size
    each = cdiv(tokens, size)
    return Question(
        f"{usable} blocks of {size} can be given out. How many requests of {tokens} tokens fit at once, if "
        f"nothing is shared?",
        str(usable // each),
        f"Each has {each} blocks: {usable} / {each}, rounded down, is {usable // each}.",
        ("How many blocks has each of them?", "A request gets all of its blocks or none."),
        wrong={
            str(
                usable * size // tokens
            ): "tokens of two requests do not share a block: round up first",
            str(cdiv(usable, each)): "the last one would lack blocks",
        },
    )


@question
def block_bytes(book: Book, rng: random.Random) -> Question:
    size, kv, head, width = book.block_size, book.num_kv_heads, book.head_size, book.element_size
    layers = rng.randrange(2, 41)
    one = size * kv * head * width
    whole = 2 * one * layers
    return Question(
        f"A model like this one, but with {layers} layers: how many bytes is one block in all of them? "
        f"({size} tokens, {kv} KV heads of {head}, {width} bytes an element)",
        str(whole),
        f"2 (K and V) x {size} x {kv} x {head} x {width} x {layers} layers = {whole}.",
        ("Both K and V are in it.", f"In one layer it is {2 * one} bytes."),
        wrong={
            str(one * layers): "K and V are both stored: twice that",
            str(2 * one): f"that is one layer; there are {layers}",
            str(whole // kv * book.num_heads): "it has KV heads, not query heads",
        },
    )


@question
def attention_calls(book: Book, rng: random.Random) -> Question:
    ran = [step for step in book.steps if step.called]
    chosen = rng.sample(ran, min(len(ran), rng.randrange(2, 5)))
    count = sum(len(step.called.dur_ns) for step in chosen if step.called)
    numbers = ", ".join(str(s.number) for s in sorted(chosen, key=lambda s: s.number))
    return Question(
        f"How often was the attention kernel called in steps {numbers} together?",
        str(count),
        f"Once for each of {book.num_layers} layers in each of {len(chosen)} steps: {count}.",
        ("A layer calls it once a step, however many requests the step has.",),
        wrong={
            str(len(chosen)): "that is once a step; every layer has an attention of its own",
            str(sum(len(s.counts) for s in chosen) * book.num_layers):
                "not once for each request: the batch goes through in one call",
        },
        look="kernels",
    )  # fmt: skip


@question
def layer_of_call(book: Book, rng: random.Random) -> Question:
    layers, kv = book.num_layers, book.num_kv_heads
    first = rng.randrange(max(1, len(book.steps) - 6))
    some = book.steps[first : first + rng.randrange(1, 6)]
    tokens = sum(step.num_tokens for step in some)
    return Question(
        f"Steps {some[0].number} to {some[-1].number} computed {many(tokens, 'token')}. How many K vectors (one "
        f"for each token, layer and KV head) did they write?",
        str(tokens * layers * kv),
        f"{tokens} tokens x {layers} layers x {kv} KV heads = {tokens * layers * kv}.",
        ("Every layer writes its own.", f"There are {kv} KV heads in each of {layers} layers."),
        wrong={
            str(tokens * kv): f"that is one layer; there are {layers}",
            str(tokens * layers): f"each of {kv} KV heads has its own",
            str(tokens * layers * kv * 2): "V is not asked for",
        },
        look="steps",
    )


# Blocks ------------------------------------------------------------------------------------


@question
def blocks_needed(book: Book, rng: random.Random) -> Question:
    size = book.block_size
    near = rng.choice((0, 1, -1))
    tokens = max(1, rng.randrange(2, 12) * size + near)
    need = cdiv(tokens, size)
    return Question(
        f"A sequence has {tokens} tokens. How many blocks of {size} does its table have?",
        str(need),
        f"{tokens} / {size}, rounded up: {need}. The last block holds {(tokens - 1) % size + 1}.",
        ("A block that is begun is a whole block.",),
        wrong={
            str(tokens // size): "the last, partly filled block counts too",
            str(need + 1): "a full last block needs no further one until the next token comes",
            str(tokens): "blocks, not tokens",
        },
    )


def _allocation(book: Book, rng: random.Random) -> Allocation:
    return rng.choice([one for one in book.allocations if one.new] or book.allocations)


@question
def free_after(book: Book, rng: random.Random) -> Question:
    one = _allocation(book, rng)
    before = one.free + len(one.new)
    return Question(
        f"Before event {one.event}, {before} blocks were free. {book.name(one.request)} then got "
        f"{many(len(one.new), 'new block')} and {len(one.hits)} by prefix hit, which others were using. "
        f"How many were free after it?",
        str(one.free),
        f"{before} - {len(one.new)} = {one.free}: a block that is in use is shared, not taken.",
        ("Only what comes from the free queue is gone from it.",),
        wrong={
            str(before): "new blocks leave the queue",
            str(before - len(one.new) - len(one.hits)): "a hit on a block in use takes none",
        },
        look=f"events --step {_step_of(book, one)}",
    ) if _hits_in_use(book, one) else Question(
        f"Before event {one.event}, {before} blocks were free. {book.name(one.request)} then took "
        f"{ids_text(one.new)} from the queue. How many were free after it?",
        str(one.free),
        f"{before} - {len(one.new)} = {one.free}.",
        ("Count what it took.",),
        wrong={str(before): "new blocks leave the queue"},
        look=f"events --step {_step_of(book, one)}",
    )  # fmt: skip


def _hits_in_use(book: Book, one: Allocation) -> bool:
    """Whether each of its hits had an owner already, so that the queue did not shrink by them."""
    last = None
    for number, event in book.touched:
        if number < one.event and set(event.blocks) >= set(one.hits):
            last = event
    return bool(one.hits) and last is not None and all(count > 1 for count in last.ref_cnts)


def ids_text(blocks: list[int]) -> str:
    if len(blocks) > 8:
        return f"{len(blocks)} blocks"
    return f"block{'s' * (len(blocks) > 1)} {', '.join(map(str, blocks))}"


def _step_of(book: Book, one: Allocation) -> int:
    return next((s.number for s in book.steps if s.event > one.event), book.steps[-1].number)


@question
def next_block(book: Book, rng: random.Random) -> Question:
    freed = rng.choice([one for one in book.freed if one.queue_after])
    head = freed.queue_after[0]
    tail_first = " ".join(map(str, freed.blocks[:8]))
    unhashed = [b for b, h, c in zip(freed.blocks, freed.hashed, freed.ref_cnts) if not h and not c]
    reason = (
        f"{head} has no hash, so nobody can find it again: it goes to the front"
        if unhashed
        else "what came back has hashes and went to the end; the head stayed as it was"
        if freed.queue_before
        else "all of them have hashes and went to the end, in this order, of an empty queue"
    )
    return Question(
        f"At event {freed.event} blocks {tail_first}{' …' if len(freed.blocks) > 8 else ''} came "
        f"back. Which block will be handed out next?",
        str(head),
        f"Block {head}: {reason}.",
        (
            "Blocks come back tail first. Those without a hash go to the front of the queue.",
            "The evidence has the queue before and after the first free.",
        ),
        wrong={
            str(freed.queue_after[-1]): "that is the other end of the queue: it is taken last",
            str(freed.blocks[-1]): "it was freed last; the queue is not a stack of everything",
            str(freed.queue_before[0] if freed.queue_before else -1):
                "it was the head before; unhashed blocks go in front of it",
        },
        look="blocks",
    )  # fmt: skip


@question
def refusal(book: Book, rng: random.Random) -> Question:
    size = book.block_size
    known = [one for one in book.refused if cdiv(one.num_tokens, size) - one.held > one.free]
    if known:
        one = rng.choice(known)
        held, tokens, free = one.held, one.num_tokens, one.free
        head = f"At event {one.event} allocate_slots for {book.name(one.request)} returned None"
        look = "events --kind slots"
    else:
        held, free, look = rng.randrange(1, 4), rng.randrange(0, 3), ""
        tokens = (held + free) * size + rng.randrange(1, size)
        head = "A request was refused"
    need = cdiv(tokens, size) - held
    return Question(
        f"{head}. It held {many(held, 'block')} of {size} tokens and needed room for {tokens} tokens in all; "
        f"{many(free, 'block')} {'was' if free == 1 else 'were'} free. How many blocks were missing?",
        str(need - free),
        f"{tokens} / {size} rounded up is {cdiv(tokens, size)}, less {held} it held: {need} wanted, {free} "
        f"free. It got none of them: all or nothing.",
        (
            "How many blocks must its table have in the end?",
            "Take off what it has and what is free.",
        ),
        wrong={
            str(need): "some of what it wanted was free",
            "0": "then it would not have been refused",
            str(cdiv(tokens, size)): "that is its whole table",
        },
        look=look,
    )


@question
def preempted_tokens(book: Book, rng: random.Random) -> Question:
    if not book.preempted:
        return blocks_needed(book, rng)
    number, event = rng.choice(book.preempted)
    computed, size = event.num_computed_tokens, book.block_size
    kept = rng.randrange(0, computed // size + 1)
    left = computed + 1 - kept * size
    return Question(
        f"{book.name(event.request)} was preempted at event {number}: {computed} computed tokens were given "
        f"up, and one that had come out waits to go in. If {kept} of its full blocks of {size} are still "
        f"cached when it returns, how many tokens does it compute then?",
        str(left),
        f"{computed} + 1 - {kept} x {size} = {left}. V1 never swaps; what is not cached is computed again.",
        ("What would it be if nothing were cached?", f"Each cached block saves {size} tokens."),
        wrong={
            str(left - 1): "the token that came out last goes in too",
            str(computed + 1 - kept): "a cached block saves a block's worth of tokens",
            str(computed): "what is cached need not be computed",
        },
        look="events --kind request.preempted,blocks.freed",
    )


# Tables ------------------------------------------------------------------------------------


@question
def slot_of(book: Book, rng: random.Random) -> Question:
    step, request, position = position_of(book, rng)
    size, table = book.block_size, step.tables[request]
    logical, place = divmod(position, size)
    slot = table[logical] * size + place
    return Question(
        f"The table of {book.name(request)} is {_shown(table, logical)} (blocks of {size}). "
        f"In which slot is position {position}?",
        str(slot),
        f"{position} = {logical} x {size} + {place}; table[{logical}] = {table[logical]}; "
        f"{table[logical]} x {size} + {place} = {slot}.",
        (f"Which logical block is position {position} in?", "slot = table[p // size] * size + p % size"),
        wrong={
            str(slot + size): "one block too far: logical blocks count from 0",
            str(slot - size): "one block short: logical blocks count from 0, and so do positions",
            str(position): "that is the position; the table says where it lies",
            str(logical * size + place): "you used the logical block as if it were the physical one",
            str(table[logical]): "that is the block; a slot also says which place in it",
            str(slot + 1): "off by one: positions and places count from 0",
            str(slot - 1): "off by one: positions and places count from 0",
        },
        look=f"requests --request {book.name(request)}",
    )  # fmt: skip


def _shown(table: list[int], upto: int) -> str:
    """A table as it can be counted through, shortened around what is asked."""
    if len(table) <= 18:
        return "[" + ", ".join(map(str, table)) + "]"
    low = max(0, upto - 3)
    some = ", ".join(f"{i}: {table[i]}" for i in range(low, min(len(table), upto + 4)))
    return f"(logical: physical) {some}, …"


@question
def physical_of(book: Book, rng: random.Random) -> Question:
    step, request, position = position_of(book, rng)
    size, table = book.block_size, step.tables[request]
    logical = position // size
    return Question(
        f"In step {step.number} the table of {book.name(request)} is {_shown(table, logical)}. "
        f"Which physical block holds position {position}?",
        str(table[logical]),
        f"{position} // {size} = {logical}, and table[{logical}] = {table[logical]}.",
        (f"Blocks have {size} tokens, and the first is logical block 0.",),
        wrong={
            str(logical): "that is the logical block: look it up in the table",
            **({str(table[logical - 1]): "one block too early: positions count from 0"} if logical else {}),
            **(
                {str(table[logical + 1]): "one block too far: off by one block"}
                if logical + 1 < len(table)
                else {}
            ),
        },
        look=f"requests --request {book.name(request)}",
    )  # fmt: skip


@question
def ref_count(book: Book, rng: random.Random) -> Question:
    step = max(book.steps, key=lambda s: len(s.tables))
    owners: dict[int, int] = {}
    for table in step.tables.values():
        for block in table:
            owners[block] = owners.get(block, 0) + 1
    shared = [b for b, count in owners.items() if count > 1]
    if not shared:
        return physical_of(book, rng)
    block = rng.choice(shared)
    count = owners[block]
    gone = rng.randrange(1, count)
    return Question(
        f"In step {step.number}, {len(step.tables)} requests run, and block {block} stands in {count} of "
        f"their tables. If {gone} of these finish, what is its reference count?",
        str(count - gone),
        f"It counts the tables it is in: {count} - {gone} = {count - gone}. At 0 it joins the free queue.",
        ("A reference count is the number of tables.", "Who finishes gives back all of its table."),
        wrong={
            "0": "the others still hold it",
            str(count): "who is gone does not count",
            str(count - gone - 1): "the request that computed it is one of them",
        },
        look=f"requests --step {step.number}",
    )


@question
def hit_tokens(book: Book, rng: random.Random) -> Question:
    size = book.block_size
    again = {event.request for _, event in book.preempted}
    hit = [one for one in book.allocations if one.hits and one.request not in again]
    if hit:
        one = rng.choice(hit)
        prompt = book.arrived[one.request].num_prompt_tokens
        tokens = len(one.hits) * size
        return Question(
            f"{book.name(one.request)} has a prompt of {prompt} tokens and hit {len(one.hits)} cached "
            f"blocks. How many of its prompt tokens were left to compute?",
            str(prompt - tokens),
            f"{prompt} - {len(one.hits)} x {size} = {prompt - tokens}.",
            ("A hit is whole blocks.", f"{len(one.hits)} blocks of {size} need no computing."),
            wrong={
                str(tokens): "that is what was hit; asked is the rest",
                str(prompt): "hits need not be computed again",
                str(prompt - len(one.hits)): "blocks, not tokens: each saves a block's worth",
                str(prompt - tokens - size): "one block too many",
            },
            look=f"events --request {book.name(one.request)} --kind prefix,slots.allocated",
        )
    length = rng.randrange(2, 6) * size
    return Question(
        f"A prompt of {length} tokens is in the cache as a whole. How many of them are computed anew?",
        str(size),
        f"At most {length} - 1 tokens may be hit, in whole blocks: {length - size}. The last block is "
        f"computed, because someone must make logits.",
        ("The last token must go through the model.", "Hits are whole blocks."),
        wrong={"0": "then there would be no logits", "1": "hits are whole blocks"},
    )


@question
def shared_saved(book: Book, rng: random.Random) -> Question:
    step = rng.choice([s for s in book.steps if len(s.tables) > 1] or book.steps)
    held = sum(len(table) for table in step.tables.values())
    real = len({block for table in step.tables.values() for block in table})
    return Question(
        f"In step {step.number} the {len(step.tables)} tables have {held} entries, and "
        f"{real} different blocks stand in them. How many blocks does sharing save?",
        str(held - real),
        f"{held} - {real} = {held - real}: without sharing each entry would be a block of its own.",
        ("What would it be if nobody shared?",),
        wrong={str(real): "that is what is used; asked is what is not", str(held): "some are the same"},
    )  # fmt: skip
