"""A probe's parameters say what it reads; a row is what it says at its level."""

from vllm_trace.hooks.table import Hook, Probe, probe


def first(append, result, started, ended, self, request, num_tokens):
    pass


def before(request, priority):
    return request, priority


def test_what_a_probe_reads_of_the_call_is_what_the_wrapper_does_not_provide():
    made = Probe(first, before=before, as_list=("blocks",))
    assert ("self", "request", "num_tokens", "priority", "blocks") == made.reads
    assert ("first", True) == (made.name, made.timed)


def test_the_decorator_makes_a_probe_of_a_function():
    @probe(flush=True)
    def step(append):
        pass

    assert (Probe, True, False, ()) == (type(step), step.flush, step.timed, step.reads)


def test_a_row_without_a_light_probe_is_no_part_of_level_light():
    full, light = Probe(first), Probe(before)
    row = Hook("a.b:C.d", full, emits="x.y", without="z", light=light, required=True)
    assert row is row.at_level("full")
    assert (light, True) == (row.at_level("light").probe, row.at_level("light").required)
    assert None is Hook("a.b:C.d", full, emits="x.y", without="z").at_level("light")
    assert ("a.b", "C.d") == (row.module, row.qualname)
