"""``record``: any command, with tracing on in every vLLM process that it starts."""

from __future__ import annotations

import argparse
from dataclasses import replace

from vllm_trace.cli.parser import AddVerb, recording_flags, recording_options
from vllm_trace.cli.printing import print_json, say
from vllm_trace.errors import UsageError


def add(verb: AddVerb) -> None:
    record = verb(
        "record", _record, "Run any command with tracing on in every vLLM process",
        "record -- vllm serve MODEL --port 8000",
    )  # fmt: skip
    recording_flags(record)
    record.add_argument(
        "command",
        nargs=argparse.REMAINDER,
        help="-- and the command; its exit code is returned, or 1 when that is 0 and spans for --otlp were lost",
    )


def _record(arguments: argparse.Namespace) -> int:
    from vllm_trace import reports, sidecar
    from vllm_trace.record import record

    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        raise UsageError("record needs a command", hint="vllm-trace record -- python script.py")
    options = recording_options(arguments)
    url, options = options.otlp, replace(options, otlp="")
    if url:
        sidecar.check(url)
    run = reports.new_run("record", arguments.output)
    beside = sidecar.start(run.trace, url) if url else None
    try:
        code = record(command, run.trace, options)
    except BaseException as error:
        if beside is not None:
            beside.abandon()
        if isinstance(error, UsageError):
            run.discard()
        raise
    said = reports.describe_recording(run)
    say(said)
    if options.shadow and "shadow: " not in said:
        say("the shadow compared no attention call")
    document = {"schema": 1, "code": code, "trace": str(run.trace), "said": said}
    if beside is not None:
        told = beside.finish()
        document["otlp"] = told.to_dict()
        say(told.text(run.folder))
        # The command's own code is never hidden; a good one does not hide lost spans.
        code = code or int(told.failed)
    if arguments.json:
        print_json(document)
    return code
