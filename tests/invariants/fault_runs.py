"""Runs scenarios on a real engine, with one of the ``faults`` in it, and judges what was recorded."""

import contextlib
import io
from dataclasses import dataclass

from invariants.surgery import Fault, Surgeon


def arguments_of(one):
    """Engine arguments of a fault; those that are objects of vLLM are made here."""
    made = dict(one.engine_args)
    if "kv_events_config" in made:
        from vllm.config import KVEventsConfig

        made["kv_events_config"] = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    return made


MOST_STEPS = 200
"""A fault can make an engine wait for ever; no scenario used here needs as many steps."""


def limit(surgeon):
    """Have the scheduler raise after so many steps."""
    from vllm.v1.core.sched.scheduler import Scheduler

    def make(schedule):
        def limited(self, throttle_prefills=False):
            if self.current_step >= MOST_STEPS:
                raise RuntimeError("the faulty engine has run long enough")
            return schedule(self, throttle_prefills)

        return limited

    surgeon.replace(Scheduler, "schedule", make)


def record(scenario_name, folder, *, engine_args=None, surgeon=None, inject=None):
    """Run a scenario on a real engine, traced into the folder; with a fault it may end badly."""
    from vllm_trace import hooks, runner, scenario
    from vllm_trace.options import Options
    from vllm_trace.trace import read_trace

    chosen = scenario.load(scenario_name)
    try:
        if inject is not None:
            limit(surgeon)
            inject(surgeon)
        with contextlib.redirect_stderr(io.StringIO()):
            hooks.attach(Options(dir=str(folder)))
        try:
            llm, _ = runner.start_engine(chosen, engine_args=engine_args or {})
            try:
                runner.run_workload(llm, chosen)
            except Exception:  # vLLM's own assertions may stop it: the trace is what counts
                if inject is None:
                    raise
            with contextlib.suppress(Exception):
                runner.stop_engine(llm)
        finally:
            hooks.detach()
    finally:
        if surgeon is not None:
            surgeon.close()
    return read_trace(folder)


@dataclass
class Caught:
    """What a fault's trace was judged to be."""

    fault: Fault
    report: object
    violation: object
    kind: str
    steps_late: int
    """Steps between the one that was begun when the fault struck and the violation's."""


def run(one, folder):
    """Run a fault, judge its trace by all invariants."""
    from vllm_trace.invariants import check

    surgeon = Surgeon()
    trace = record(
        one.scenario, folder, engine_args=arguments_of(one), surgeon=surgeon, inject=one.inject
    )
    report = check(trace, label=one.id)
    found = next((v for v in report.violations if v.invariant == one.invariant), None)
    kind, begun = "", 0
    for record_ in trace.records():
        event = record_.event
        if event.kind == "step.scheduled" and event.started_ns <= surgeon.struck_ns:
            begun = event.step
        if found is not None and record_.number == found.event_number:
            kind = event.kind
    late = (found.step or 0) - begun if found is not None else -1
    return Caught(one, report, found, kind, late)
