"""What holds for the table of every release, whichever is installed."""

import pytest

from vllm_trace.events import KINDS
from vllm_trace.hooks.resolve import choose
from vllm_trace.patches import TABLES, v0_11, v0_20, v0_32, v0_33

MODULES = {"0.11": v0_11, "0.20": v0_20, "0.32": v0_32, "0.33": v0_33}


@pytest.fixture(params=MODULES, ids=MODULES)
def module(request):
    return MODULES[request.param]


def test_each_release_has_its_own_table():
    assert len(MODULES) == len(TABLES)
    for version, module in MODULES.items():
        assert module.TABLE is choose(TABLES, f"{version}.0")


def test_every_row_was_reviewed_and_nothing_else_is_listed(module):
    assert {hook.target for hook in module.TABLE.hooks} == set(module.FINGERPRINTS)
    assert all(hook.fingerprints for hook in module.TABLE.hooks)


def test_no_function_is_hooked_twice(module):
    targets = [hook.target for hook in module.TABLE.hooks]
    assert sorted(set(targets)) == sorted(targets)


def test_every_row_emits_events_that_exist_and_says_what_its_absence_costs(module):
    for hook in module.TABLE.hooks:
        assert set(hook.emits.split()) <= set(KINDS), hook.target
        assert hook.emits and hook.without, hook.target


def test_level_light_is_the_few_rows_that_are_meant_to_stay_on(module):
    if module is v0_11:
        assert not [hook for hook in module.TABLE.hooks if hook.light]
        return
    light = [hook.qualname for hook in module.TABLE.hooks if hook.light and not hook.platform]
    assert [
        "Scheduler.__init__",
        "Scheduler.schedule",
        "Scheduler.update_from_output",
        "Scheduler.add_request",
        "Scheduler._free_request",
        "Scheduler._preempt_request",
        "EngineCore.shutdown",
        "GPUModelRunner.execute_model",
        "GPUModelRunner._model_forward",
        "GPUModelRunner.sample_tokens",
        "Attention.__init__",
    ] == light


def test_what_is_required_is_required_of_both_platforms(module):
    assert {""} == {hook.platform for hook in module.TABLE.hooks if hook.required}
