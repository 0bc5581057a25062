"""The pytest plugin: a trace's invariants as tests, and a fixture that records inside a test.

``pytest --vllm-trace PATH`` makes one test of each invariant and trace. The fixture
``vllm_trace`` traces the vLLM of the test that asks for it; the marker ``vllm_invariants`` judges
that trace when the test has passed.

Every pytest of the environment loads this file, so nothing but pytest is imported at its top.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vllm_trace.invariants.judgements import Judgement, Report
    from vllm_trace.invariants.registry import Invariant
    from vllm_trace.trace import Trace

MARKER = "vllm_invariants(*ids, also=[]): judge the trace of the fixture vllm_trace after the test"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vllm_trace")
    group.addoption(
        "--vllm-trace", action="append", default=[], metavar="PATH", dest="vllm_trace",
        help="judge this trace: one test for each invariant (repeatable)",
    )  # fmt: skip
    group.addoption(
        "--vllm-trace-only", default="", metavar="ID,ID", dest="vllm_trace_only",
        help="only these invariants",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)


# Tests of a trace -----------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    paths = config.getoption("vllm_trace")
    if not paths:
        return
    from vllm_trace.errors import VllmTraceError

    only = [one for one in config.getoption("vllm_trace_only").split(",") if one]
    try:
        for path in paths:
            collector = TraceTests.from_parent(session, name=path, nodeid=path, only=only)
            items.extend(collector.collect())
    except VllmTraceError as error:
        raise pytest.UsageError(f"{error}. {error.hint}") from None


class TraceTests(pytest.Collector):
    """The tests of one trace; it is read when the first of them runs."""

    def __init__(self, *, only: list[str], **options: Any) -> None:
        super().__init__(**options)
        self.only = only
        self._report: Report | None = None
        self._error: Exception | None = None

    def collect(self) -> list[pytest.Item]:
        from vllm_trace.invariants.registry import choose

        names = [one.id for one in choose(self.only)]
        return [
            WholeTest.from_parent(self, name="whole"),
            *(InvariantTest.from_parent(self, name=name) for name in names),
        ]

    @property
    def report(self) -> Report:
        """Read the trace, once."""
        if self._error is not None:
            raise self._error
        if self._report is None:
            from vllm_trace.invariants.checking import check
            from vllm_trace.trace import read_trace

            try:
                self._report = check(read_trace(self.name), self.only, label=self.name)
            except Exception as error:
                self._error = error
                raise
        return self._report


class _TraceTest(pytest.Item):
    parent: TraceTests

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        from vllm_trace.errors import VllmTraceError

        error = excinfo.value
        if isinstance(error, AssertionError):
            return str(error)
        if isinstance(error, VllmTraceError):
            return f"{error}\n{error.hint}".rstrip()
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return Path(self.parent.name), None, f"{self.parent.name}: {self.name}"


class WholeTest(_TraceTest):
    """That the trace is the whole truth: without this one, skipped tests would look like a pass."""

    def runtest(self) -> None:
        missing = self.parent.report.incomplete
        if missing:
            raise AssertionError(unjudged_in_words(missing))


class InvariantTest(_TraceTest):
    """One invariant on one trace."""

    def runtest(self) -> None:
        report = self.parent.report
        judgement = next(each for each in report.judgements if each.invariant.id == self.name)
        if judgement.status == "unjudged":
            pytest.skip(judgement.reason)
        if judgement.status != "holds":
            raise AssertionError(in_words(judgement))


def unjudged_in_words(reasons: list[str]) -> str:
    """Why a trace is no pass although nothing was found."""
    return "\n".join(["not everything can be judged:", *(f"  {reason}" for reason in reasons)])


def in_words(judgement: Judgement) -> str:
    """A failure as a reader wants it: the sentence, what broke it, the story."""
    from vllm_trace.invariants.judgements import where

    found = judgement.violation
    if found is None:
        return f"{judgement.invariant.id}: {judgement.reason}"
    return "\n".join(
        [
            f"{judgement.invariant.id}: {judgement.invariant.sentence}",
            f"violated at {where(found)}: {found.message}",
            *(f"  {line}" for line in judgement.story),
        ]
    )


# Recording inside a test ----------------------------------------------------------------


class Recording:
    """What the fixture ``vllm_trace`` gives: the trace of the vLLM engines of this test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._closed = False

    def stop(self) -> None:
        """Take the hooks off and close the trace. Engines go on untraced."""
        if not self._closed:
            self._closed = True
            from vllm_trace.hooks import detach

            detach()

    def trace(self) -> Trace:
        """The trace, after ``stop``. Raises: ``TraceError`` when no engine ran."""
        from vllm_trace.trace import read_trace

        self.stop()
        gc.collect()  # an engine that nobody holds any more ends, and its process closes its file
        return read_trace(self.folder)

    def check(self, *ids: str, also: tuple[Any, ...] | list[Any] = ()) -> Report:
        """Judge the trace by some invariants (default: all) and functions of your own.

        Raises: ``AssertionError`` with the first event that breaks each.
        """
        __tracebackhide__ = True
        from vllm_trace.invariants.checking import check

        report = check(self.trace(), ids, [_as_invariant(rule) for rule in also])
        # Raised, not asserted: pytest rewrites the asserts of plugins and would add to the words.
        broken = [*report.of("violated"), *report.of("raised")]
        if broken:
            raise AssertionError("\n\n".join(in_words(each) for each in broken))
        if report.verdict != "clean":
            said = unjudged_in_words(report.incomplete)
            if any("still runs" in reason for reason in report.incomplete):
                said += (
                    "\nAn engine in a process of its own closes its file when it ends: let go of it in the test "
                    "(no global, no fixture that outlives it), or start it with VLLM_ENABLE_V1_MULTIPROCESSING=0."
                )
            raise AssertionError(said)
        return report


def _as_invariant(rule: Any) -> Invariant:
    from vllm_trace.invariants.registry import Invariant, describe

    if isinstance(rule, Invariant):
        return rule
    name = getattr(rule, "__name__", "rule")
    sentence = (getattr(rule, "__doc__", "") or name).strip().splitlines()[0]
    return describe(rule, name.lower().replace("_", "-"), sentence)


@pytest.fixture
def vllm_trace(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: Any
) -> Iterator[Recording]:
    """Trace every vLLM engine that the test makes, in this process and in those it starts.

    ``vllm_trace.trace()`` is the trace so far recorded, ``vllm_trace.check()`` judges it; the
    marker ``vllm_invariants`` does that when the test has passed.
    """
    from vllm_trace.hooks import attach
    from vllm_trace.options import Options

    recording = Recording(tmp_path / "vllm_trace")
    options = Options(dir=str(recording.folder))
    for name, value in options.to_environment().items():
        monkeypatch.setenv(name, value)
    attach(options)
    try:
        yield recording
    finally:
        recording.stop()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Any:
    """The marker's check is part of the test: what it finds is a failure."""
    __tracebackhide__ = True
    result = yield
    marker = pyfuncitem.get_closest_marker("vllm_invariants")
    if marker is not None:
        recording = pyfuncitem.funcargs.get("vllm_trace")
        if not isinstance(recording, Recording):
            pytest.fail("the marker vllm_invariants needs the fixture vllm_trace", pytrace=False)
        recording.check(*marker.args, **marker.kwargs)
    return result
