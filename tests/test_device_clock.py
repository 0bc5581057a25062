"""Times on a device, on events that behave as CUDA's do: nothing waits but closing."""

from types import SimpleNamespace

import pytest

from vllm_trace import device_clock
from vllm_trace.device_clock import elapsed_ns, give_back, mark, passed


class FakeEvent:
    made = 0

    def __init__(self, enable_timing):
        assert enable_timing
        type(self).made += 1
        self.at, self.over, self.waited = None, False, False

    def record(self):
        self.at = 5.0

    def query(self):
        return self.over

    def synchronize(self):
        self.waited = self.over = True

    def elapsed_time(self, other):
        return other.at - self.at


@pytest.fixture
def cuda(monkeypatch):
    """A torch with a device, or what of it a mark needs."""
    FakeEvent.made = 0
    fake = SimpleNamespace(Event=FakeEvent, is_current_stream_capturing=lambda: False)
    monkeypatch.setitem(__import__("sys").modules, "torch", SimpleNamespace(cuda=fake))
    monkeypatch.setattr(device_clock, "_free", [])
    return fake


ON_CUDA, ON_CPU = SimpleNamespace(is_cuda=True), SimpleNamespace(is_cuda=False)


def test_there_is_no_mark_on_the_cpu_nor_without_a_tensor_nor_inside_a_graph(cuda):
    assert mark(ON_CPU) is None
    assert mark(None) is None
    cuda.is_current_stream_capturing = lambda: True
    assert mark(ON_CUDA) is None
    assert 0 == FakeEvent.made


def test_marks_have_passed_when_all_have_and_asking_waits_for_none(cuda):
    first, last = mark(ON_CUDA), mark(ON_CUDA)
    first.over = True
    assert not passed([first, None, last])
    assert not last.waited
    last.over = True
    assert passed([first, None, last])


def test_closing_waits(cuda):
    one = mark(ON_CUDA)
    assert passed([one], wait=True)
    assert one.waited


def test_elapsed_time_is_in_nanoseconds(cuda):
    first, last = mark(ON_CUDA), mark(ON_CUDA)
    first.at, last.at = 1.0, 1.0125  # ms
    assert 12_500 == elapsed_ns(first, last)


def test_a_mark_that_was_read_is_recorded_anew(cuda):
    first = mark(ON_CUDA)
    give_back((first, None))
    assert first is mark(ON_CUDA)
    assert 1 == FakeEvent.made
