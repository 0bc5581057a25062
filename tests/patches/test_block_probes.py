"""A block that is taken alone is told with the request that got it, and otherwise by itself."""

import pytest

from vllm_trace.events import BlocksTaken, SlotsAllocated
from vllm_trace.hooks import attach, detach
from vllm_trace.options import Options
from vllm_trace.patches.block_probes import slots_allocated
from vllm_trace.tracefile import TraceFile

pytestmark = pytest.mark.usefixtures("source_0_32")


@pytest.fixture
def pool(tmp_path):
    from vllm.v1.core.block_pool import BlockPool

    pool = BlockPool(num_gpu_blocks=8, enable_caching=True, hash_block_size=16)
    pool.recorder = attach(Options(dir=str(tmp_path)))
    yield pool
    detach()


class Manager:
    def __init__(self, pool):
        self.block_pool = pool


class Request:
    request_id = "r"


def events(tmp_path):
    detach()
    (path,) = tmp_path.glob("*.vtrace")
    return [*TraceFile(path).events()]


def allocate(pool, blocks):
    pool.recorder.append(
        slots_allocated(pool.recorder, Manager(pool), Request, ([*blocks],), 1, 0, None)
    )


def test_taken_by_somebody_else_than_the_manager(pool, tmp_path):
    pool.get_new_blocks(1)
    pool.get_new_blocks(2)
    pool.get_new_blocks(1)
    assert [BlocksTaken([1]), BlocksTaken([2, 3]), BlocksTaken([4])] == events(tmp_path)


def test_taken_for_a_request_which_is_one_piece_of_bytes(pool, tmp_path):
    pool.recorder.numbers.new("r")
    allocate(pool, pool.get_new_blocks(1))
    assert {bytes} == {type(item) for item in pool.recorder.pending}
    assert [BlocksTaken([1]), SlotsAllocated(0, 1, 0, [[1]], [], 6, 0)] == events(tmp_path)


def test_taken_for_a_request_with_something_between(pool, tmp_path):
    pool.recorder.numbers.new("r")
    (mine,) = pool.get_new_blocks(1)
    pool.get_new_blocks(1)
    allocate(pool, [mine])
    assert [
        BlocksTaken([1]),
        BlocksTaken([2]),
        SlotsAllocated(0, 1, 0, [[1]], [], 5, 0),
    ] == events(tmp_path)


def test_given_without_being_taken(pool, tmp_path):
    """As when the hook of the pool was taken off."""
    (mine,) = pool.get_new_blocks(1)
    pool.recorder.pending.clear()
    pool.recorder.numbers.new("r")
    allocate(pool, [mine])
    assert [SlotsAllocated(0, 1, 0, [[1]], [], 6, 0)] == events(tmp_path)
    assert not pool.recorder.failures
