"""Questions about the engine step: batches, who comes and goes, input, cache and output."""

from __future__ import annotations

import random

from vllm_trace.learn.book import Book, StepSeen
from vllm_trace.learn.evidence_steps import longest_request, mixed_step
from vllm_trace.learn.questions import Question, many, question

# The engine step ---------------------------------------------------------------------------


@question
def batch_tokens(book: Book, rng: random.Random) -> Question:
    step = rng.choice([s for s in book.steps if len(s.counts) > 1] or book.steps)
    parts = ", ".join(f"{book.name(r)} {n}" for r, n in list(step.counts.items())[:8])
    return (
        Question(
            f"Step {step.number} schedules these tokens: {parts}. How long is the flattened batch?",
            str(step.num_tokens),
            f"All of them side by side: {' + '.join(str(n) for n in step.counts.values())} = "
            f"{step.num_tokens}. There is no padding to the longest.",
            ("Everybody's tokens stand in one row.",),
            wrong={
                str(len(step.counts)): "that is the number of requests",
                str(
                    max(step.counts.values()) * len(step.counts)
                ): "there is no padding to the longest",
            },
            look=f"steps --step {step.number}",
        )
        if len(step.counts) <= 8
        else _who_decodes(book, step)
    )


def _who_decodes(book: Book, step: StepSeen) -> Question:
    ones = sum(n == 1 for n in step.counts.values())
    return Question(
        f"Step {step.number} has {len(step.counts)} requests and {step.num_tokens} tokens; {ones} of "
        f"them decode, with one token each. How many tokens are of prompts?",
        str(step.num_tokens - ones),
        f"{step.num_tokens} - {ones} = {step.num_tokens - ones}.",
        ("Take the decodes away.",),
        wrong={str(step.num_tokens): "some of them decode"},
    )


@question
def whose_token(book: Book, rng: random.Random) -> Question:
    step = mixed_step(book)
    token = rng.choice(step.tokens() or [])
    owners = [book.name(r) for r in step.counts]
    order, at = [], 0
    for request, count in zip(step.mapped.requests, step.mapped.query_lens):  # type: ignore[union-attr]
        order.append(f"{book.name(request)} {count}")
        at += count
    return Question(
        f"The flattened batch of step {step.number} is, in this order: {', '.join(order[:8])} tokens. "
        f"Whose is token {token.place} (the first is 0)?",
        book.name(token.request),
        f"Token {token.place} is position {token.position} of {book.name(token.request)}, "
        f"in slot {token.slot}.",
        ("Count through the query lengths.",),
        choices=tuple(owners),
        look=f"events --step {step.number} --kind slots.mapped",
    )


@question
def position_in_batch(book: Book, rng: random.Random) -> Question:
    step = rng.choice(book.steps)
    request = rng.choice(list(step.counts))
    before, count = step.before[request], step.counts[request]
    return Question(
        f"{book.name(request)} has {many(before, 'token')} in the cache and gets {count} more in step "
        f"{step.number}. Which position has the last of them (from 0)?",
        str(before + count - 1),
        f"{before} + {count} - 1 = {before + count - 1}.",
        ("Positions count from 0, and those in the cache come first.",),
        wrong={
            str(before + count): "off by one: positions count from 0",
            str(count - 1): "positions are of the sequence, not of the batch",
        },
        look=f"events --step {step.number} --kind slots.mapped",
    )


@question
def who_left(book: Book, rng: random.Random) -> Question:
    last = {r: s for s in book.steps for r in s.counts}
    request = rng.choice([r for r in last if r in book.finished] or list(last))
    step = last[request]
    left = len([r for r, s in last.items() if s.number > step.number and r in step.counts])
    stay = len(step.counts)
    done = [r for r in step.counts if last[r].number == step.number]
    return Question(
        f"Step {step.number} has {many(stay, 'request')} and is the last step of {len(done)} of them. How "
        f"many of its requests are in a later step?",
        str(left),
        f"{stay} - {len(done)} = {left}. Nobody waits for the others to be done.",
        ("Who is done leaves at once, the rest goes on.",),
        wrong={"0": "the others go on without it", str(stay): "who is done is not in the next step"},
        look=f"steps --step {step.number}",
    )  # fmt: skip


@question
def wait_for_slowest(book: Book, rng: random.Random) -> Question:
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for i, step in enumerate(book.steps):
        for request in step.counts:
            first.setdefault(request, i)
            last[request] = i
    static = max(last[r] - first[r] + 1 for r in last)
    request = rng.choice([r for r in last if last[r] - first[r] + 1 < static] or list(last))
    own = last[request] - first[request] + 1
    return Question(
        f"{book.name(request)} was in the batch from step {book.steps[first[request]].number} to "
        f"{book.steps[last[request]].number}. With a static batch it would have stayed as long as the "
        f"longest request, {static} steps. How many steps did it not have to wait?",
        str(static - own),
        f"It took {own} steps; {static} - {own} = {static - own}.",
        ("Both ends count: from 3 to 5 are three steps.",),
        wrong={
            str(static - own + 1): "off by one: both ends count",
            str(own): "that is how long it took",
        },
    )


@question
def loop_input(book: Book, rng: random.Random) -> Question:
    request = longest_request(book)
    steps = [s for s in book.steps if request in s.counts]
    index = rng.randrange(1, len(steps))
    step = steps[index]
    position = step.before[request]
    return Question(
        f"Step {step.number} decodes {book.name(request)}; {position} tokens are in the cache. The K "
        f"and V of which position are written in this step (positions from 0)?",
        str(position),
        f"Positions 0 to {position - 1} are in the cache, so the input is position {position}: the token "
        f"that the step before put out. Its K and V are written now.",
        ("The cache has positions from 0.", "The newest token's K and V are not there yet."),
        wrong={
            str(position - 1): "that one is in the cache already: off by one",
            str(position + 1): "that one is this step's output; it has no K and V yet",
        },
        look=f"events --step {step.number}",
    )


@question
def loop_last(book: Book, rng: random.Random) -> Question:
    request = longest_request(book)
    prompt = book.arrived[request].num_prompt_tokens
    steps = [
        s
        for s in book.steps
        if request in s.counts and s.before[request] + s.counts[request] >= prompt
    ]
    step = rng.choice(steps)
    stored = step.before[request] + step.counts[request]
    out = stored - prompt + 1
    return Question(
        f"{book.name(request)} has a prompt of {prompt} tokens. After step {step.number}, "
        f"{many(out, 'token')} had come out. K and V of how many tokens were in its blocks?",
        str(stored),
        f"{prompt} + {out} - 1 = {stored}: the last token that came out had not gone in yet.",
        ("Which token was not an input yet?",),
        wrong={
            str(prompt + out): "the last token that came out has no K and V yet: off by one",
            str(prompt): "tokens that were generated are in the cache too",
        },
        look=f"events --step {step.number}",
    )


@question
def steps_of(book: Book, rng: random.Random) -> Question:
    choices = []
    for request in book.finished:
        own = [s for s in book.steps if request in s.counts]
        prompt = book.arrived[request].num_prompt_tokens
        if own and own[-1].number - own[0].number == len(own) - 1:
            parts = sum(s.before[request] < prompt for s in own)
            choices.append((request, own, parts))
    if not choices:
        return loop_last(book, rng)
    request, own, parts = rng.choice(choices)
    wanted = rng.randrange(1, len(own) - parts + 2)
    right = own[parts - 1 + wanted - 1].number
    return Question(
        f"The prompt of {book.name(request)} was computed in {many(parts, 'step')}, from step {own[0].number} on, "
        f"and it was in every step after that. In which step did its token number {wanted} come out (the "
        f"first is 1)?",
        str(right),
        f"The step that ends the prompt, {own[parts - 1].number}, makes the first token; each step after "
        f"it one more: {right}.",
        ("When does the first token come out?",),
        wrong={
            str(right + 1): "the step that ends the prompt makes a token already: off by one",
            str(right - 1): "one step makes one token: off by one",
            str(wanted): "its first step is not the engine's first",
        },
        look=f"requests --request {book.name(request)}",
    )
