"""Fingerprints of the functions that hook rows touch, as the tables in ``patches/`` keep them.

    python -m vllm_trace.hooks.fingerprints          # of the installed vLLM
    python -m vllm_trace.hooks.fingerprints DIR      # of an unpacked one

prints a Python mapping to put into ``patches/v0_NN.py`` once every function that it names was
read against its probe. ``reviewed`` gives each row its hash; a later source that differs then
resolves to ``changed``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from vllm_trace.errors import HookError, UsageError
from vllm_trace.hooks.resolve import choose
from vllm_trace.hooks.source import Definition, VllmSource
from vllm_trace.hooks.table import Hook, HookTable


def reviewed(hooks: Iterable[Hook], fingerprints: Mapping[str, str]) -> tuple[Hook, ...]:
    """The rows with their fingerprints; builds of one release that differ are divided by spaces.

    A row that the mapping does not name has none: it resolves without this check.
    """
    return tuple(
        replace(hook, fingerprints=tuple(fingerprints.get(hook.target, "").split()))
        for hook in hooks
    )


def fingerprints_of(table: HookTable, source: VllmSource) -> dict[str, str]:
    """Target → hash of what stands in ``source`` for every row of the table that is there."""
    found = {hook.target: source.find(hook.module, hook.qualname) for hook in table.hooks}
    return {
        target: definition.fingerprint
        for target, definition in found.items()
        if isinstance(definition, Definition)
    }


def as_python(fingerprints: Mapping[str, str]) -> str:
    """The mapping as source text."""
    lines = [f'    "{target}": "{text}",' for target, text in fingerprints.items()]
    return "\n".join(["FINGERPRINTS = {", *lines, "}"])


def main(arguments: list[str] | None = None) -> int:
    """Print the mapping. Exit 2 when there is no vLLM, or none of a release with a table."""
    from vllm_trace.patches import TABLES

    parser = argparse.ArgumentParser(
        prog="python -m vllm_trace.hooks.fingerprints",
        description="Print the fingerprints of all hooked functions as a Python mapping.",
    )
    parser.add_argument("dir", nargs="?", type=Path, help="an unpacked vLLM (default: installed)")
    asked = parser.parse_args(arguments)
    try:
        source = VllmSource.at(asked.dir) if asked.dir else VllmSource.installed()
        if source is None:
            parser.error("vLLM is not installed here; give the folder of an unpacked one")
        table = choose(TABLES, source.version)
    except (HookError, UsageError) as error:
        parser.error(f"{error}. {error.hint}")
    print(f"# vLLM {source.version}")
    print(as_python(fingerprints_of(table, source)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
