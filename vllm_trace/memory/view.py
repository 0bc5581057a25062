"""The calculation as text for a terminal of 80 columns."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.text import Text

from vllm_trace import render
from vllm_trace.memory.calculate import MAX_USERS, Calculation, Setting
from vllm_trace.memory.keynumbers import KeyNumber
from vllm_trace.memory.shapes import GIB, GPUS, MODELS
from vllm_trace.memory.workload import DISTRIBUTIONS, TraceBlocks

SAY = {
    "reserved": "reserved: max_model_len for everybody",
    "pow2": "pow2: output rounded up to 2^n",
    "exact": "exact: its length, known beforehand",
    "paged": "paged: block by block",
}


def report(made: Calculation, checks: list[str]) -> RenderableType:
    """All three parts, and what they were checked against."""
    parts: list[RenderableType] = [
        pool(made.setting), Text(),
        schemes(made), Text(),
        users(made), Text(),
        shared(made),
    ]  # fmt: skip
    if checks:
        parts += [Text(), Text("Checked", style="bold")]
        parts += [Padding(Text(line), (0, 0, 0, 2)) for line in checks]
    return Group(*parts)


def pool(setting: Setting) -> RenderableType:
    """What the KV cache has to live in."""
    model, gpu = setting.model, setting.gpu
    ranks = f" on each of {setting.tp} ranks" if setting.tp > 1 else ""
    weights = model.weights_of_a_rank(setting.dtype, setting.tp) / GIB
    kib = setting.token_bytes / 1024
    return Text.from_markup(
        f"[bold]{escape(model.name)}[/bold] ({model.attention}, {model.num_layers} layers,"
        f" {model.num_kv_heads} KV heads of {model.head_size}) in {setting.dtype}, KV in {setting.cache_dtype}\n"
        f"{escape(gpu.name)}: {gpu.memory_gib:g} GiB x {setting.utilization:g} - {weights:.1f} GiB weights"
        f" - {setting.overhead_gib:g} GiB overhead = {setting.kv_bytes / GIB:.2f} GiB for KV{ranks}\n"
        f"{kib:,.4g} KiB a token, {setting.num_blocks:,} blocks of {setting.block_size}"
        f" (block 0 is the null block), {setting.capacity:,} tokens"
    )


def schemes(made: Calculation) -> RenderableType:
    """Reserved and empty, by scheme."""
    work = made.workload
    title = f"Memory of {len(work.requests):,} requests ({work.name}, {work.mean:,.0f} tokens on average)"
    table = render.table("what a request is given", "GiB", "empty at end", "over life", "users")
    for one in made.wastes:
        table.add_row(
            SAY[one.scheme], f"{one.gib:,.2f}", f"{one.at_end:.1%}", f"{one.over_life:.1%}",
            _count(one.users),
        )  # fmt: skip
    said = [f"Lengths: {work.source}; {made.setting.length:,} tokens at most"]
    if work.num_cut:
        said.append(f"{work.num_cut} requests were longer and were cut")
    if (length := max(request.held for request in work.requests)) > made.setting.capacity:
        said.append(f"the longest holds {length:,} tokens and never fits")
    return Group(Text(title, style="bold"), table, Text("; ".join(said), style="dim"))


def users(made: Calculation) -> RenderableType:
    """Users that fit, by context limit."""
    known = made.scaling[0].paged_tokens_s is not None
    heads = ["max_model_len", "reserved", "paged", "times"]
    heads += ["tokens/s reserved", "tokens/s paged"] if known else []
    table = render.table(*heads, title="Users that fit at the same time", left=())
    for one in made.scaling:
        times = f"{one.paged / one.reserved:.1f}" if one.reserved else "–"
        row = [f"{one.max_model_len:,}", _count(one.reserved), _count(one.paged), times]
        if known:
            row += [_rate(one.reserved_tokens_s), _rate(one.paged_tokens_s)]
        table.add_row(*row)
    if not known:
        return table
    note = (
        "tokens/s: what the data sheet's bandwidth allows when a step reads the weights\n"
        "and every user's tokens once; a bound, no forecast. max_num_seqs may stop earlier."
    )
    return Group(table, Text(note, style="dim"))


def _count(number: int) -> str:
    return f"> {MAX_USERS:,}" if number >= MAX_USERS else f"{number:,}"


def _rate(rate: float | None) -> str:
    return "–" if not rate else f"{rate:,.0f}"


def shared(made: Calculation) -> RenderableType:
    """What a common prefix saves."""
    one = made.sharing
    size = made.setting.block_bytes
    title = f"{one.users} users share {one.prefix} tokens and have {one.own} of their own"
    table = render.table("", "blocks", "GiB", "tokens computed")
    apart = one.users * (one.prefix + one.own)
    once = apart - (one.users - 1) * one.hit_blocks * one.block_size
    table.add_row("each alone", f"{one.apart:,}", f"{one.apart * size / GIB:.2f}", f"{apart:,}")
    table.add_row("prefix cache", f"{one.shared:,}", f"{one.shared * size / GIB:.2f}", f"{once:,}")
    left = one.prefix - one.hit_blocks * one.block_size
    said = f"{one.saved:.1%} of the blocks saved"
    if left:
        said += (
            f"; {left} of the shared tokens are in no full shared block"
            f" (by single tokens: {one.saved_of_tokens:.1%})"
        )
    return Group(Text(title, style="bold"), table, Text(said, style="dim"))


def numbers(found: list[KeyNumber]) -> RenderableType:
    """The tutorial's key numbers and the verdicts."""
    lines: list[RenderableType] = [Text("The tutorial's key numbers", style="bold")]
    for one in found:
        verdict = ("holds", "green") if one.holds else ("does not hold", "red")
        head = Text(one.claim + ": ").append(*verdict)
        lines += [head, Padding(Text(f"{one.found}\n{one.under}", style="dim"), (0, 0, 0, 2))]
    return Group(*lines)


def of_trace(blocks: TraceBlocks, calculated: list[int]) -> str:
    """The calculation beside the tables of a trace, in a sentence."""
    if not blocks.blocks:
        return "the trace has no block tables to compare with (level light, or windows)"
    pairs = list(zip(blocks.blocks, calculated, strict=True))
    differ = [index for index, (real, ours) in enumerate(pairs) if real != ours]
    if not differ:
        return f"blocks of all {len(pairs)} finished requests of the trace: equal ({sum(blocks.blocks)} blocks)"
    real, ours = pairs[differ[0]]
    return (
        f"{len(differ)} of {len(pairs)} requests of the trace have other numbers of blocks; "
        f"request {differ[0]} had {real}, calculated {ours}"
    )


def presets() -> RenderableType:
    """Every GPU, model and workload by name, with its source."""
    gpus = render.table("GPU", "GiB", "GB/s", "source", title="GPUs", left=(0, 3))
    for gpu in GPUS.values():
        gpus.add_row(gpu.name, f"{gpu.memory_gib:g}", f"{gpu.bandwidth_gb_s:g}", gpu.source)
    models = render.table(
        "model", "layers", "heads", "KV", "B", "source", title="Models", left=(0, 5)
    )
    for one in MODELS.values():
        models.add_row(
            one.name, f"{one.num_layers}", f"{one.num_heads}", one.attention if one.latent else str(one.num_kv_heads),
            f"{one.num_params / 1e9:.3g}", one.source,
        )  # fmt: skip
    works = render.table("workload", "prompt", "output", "source", title="Workloads", left=(0, 3))
    for name, told in DISTRIBUTIONS.items():
        works.add_row(name, f"{told.prompt_mean:g}", f"{told.output_mean:g}", told.source)
    return Group(gpus, Text(), models, Text(), works)
