"""Steps wait for what their workers tell, and no longer than they may."""

from types import SimpleNamespace

from recorded import engine, updated

from vllm_trace.export.layers import MAX_LISTS, LayerGroups, layer_index
from vllm_trace.export.open_steps import AT_ONCE, MAX_OPEN, OpenSteps


def told(step):
    return SimpleNamespace(step=step)


def look_if_due(steps):
    if len(steps.open) >= steps.look_at:
        steps.look()


def test_a_step_leaves_when_later_ones_are_done():
    left = []
    steps = OpenSteps(4, lambda step: left.append(step.number))
    for number in range(1, 41):
        steps.at(number)
        steps.done(updated(number, []))
        look_if_due(steps)
        assert len(steps.open) <= 4 + AT_ONCE
        assert all(number - one >= 4 for one in left)
    assert [*range(1, len(left) + 1)] == left
    steps.settle()
    assert [*range(1, 41)] == left and not steps.open


def test_steps_without_results_are_waited_for_but_not_for_ever():
    left = []
    steps = OpenSteps(4, lambda step: left.append(step))
    for number in range(1, MAX_OPEN + 100):
        steps.at(number)
        look_if_due(steps)
        assert len(steps.open) <= MAX_OPEN + AT_ONCE
    assert left and {None} == {step.updated for step in left}
    steps.settle()
    assert steps.open  # these may still have results
    steps.end()
    assert MAX_OPEN + 99 == len(left) and not steps.open


def test_what_a_worker_tells_is_put_to_its_step_or_counted_as_late():
    left = []
    steps = OpenSteps(4, left.append)
    first, second = told(7), told(7)
    steps.worked("a", first)
    steps.done(updated(7, []))
    steps.worked("b", second)
    assert {"a": [first], "b": [second]} == steps.at(7).parts
    steps.settle()
    steps.worked("a", told(7))
    assert ([7], 1, 0) == ([step.number for step in left], steps.late, len(steps.open))
    steps.worked("a", told(8))
    assert (1, 1) == (steps.late, len(steps.open))


def test_layers_and_their_groups():
    assert [3, 0, -1] == [
        layer_index(name) for name in ("model.layers.3.self_attn.attn", "h.0", "attn")
    ]
    groups = LayerGroups()
    assert [(0, [0, 1])] == groups.of([0, 1])
    config = engine()
    names = ["layers.0.a", "layers.2.a"], ["layers.1.a"]
    config.groups = [SimpleNamespace(layers=layers) for layers in names]
    groups.configured(config)
    assert [(0, [0, 2, 3]), (1, [1])] == groups.of([0, 1, 2, 9])
    for number in range(3 * MAX_LISTS):
        assert [(int(number == 1), [0])] == groups.of([number])
    assert len(groups._found) <= MAX_LISTS
