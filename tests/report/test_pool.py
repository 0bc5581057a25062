"""Changes written down frame by frame give back the pool and the tables, for any history of them."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_trace.events import (
    BlockEvicted,
    BlocksCached,
    BlocksFreed,
    BlocksTaken,
    BlocksTouched,
    EngineConfigured,
    KVGroup,
    PrefixCacheReset,
    RequestFreed,
    RequestPreempted,
    SlotsAllocated,
)
from vllm_trace.report.pool import PoolChanges
from vllm_trace.show import column_of

SIZE = 12


class Story:
    """A pool as vLLM would run it, told in events; its decisions are drawn."""

    def __init__(self, changes, groups):
        self.changes, self.groups = changes, groups
        self.free = list(range(1, SIZE))
        self.ref = [0] * SIZE
        self.cached = {}
        self.tables = {}
        self.number = self.frame = 0
        self.tell(
            EngineConfigured(1, 4, 4, SIZE, [KVGroup("FullAttentionSpec", 4, [])] * groups, {})
        )

    def tell(self, event):
        self.number += 1
        self.changes.take(self.number, event, self.frame)

    def allocate(self, request, share, slide):
        """A block for each group; with ``share``, another request's blocks are hit first, with
        ``slide``, the window of that group has passed a block of the request."""
        hits = [[] for _ in range(self.groups)]
        if share is not None and request not in self.tables and share in self.tables:
            hits = [[block for block in row if block][:1] for row in self.tables[share]]
            found = [block for row in hits for block in row]
            for block in found:
                self.ref[block] += 1
            if found:
                self.tell(BlocksTouched(found, [self.ref[block] for block in found]))
        if len(self.free) < self.groups:
            if any(hits):
                self.release([b for row in hits for b in row])
            return
        row = self.tables.get(request, [[]] * self.groups)[slide % self.groups]
        passed = next((place for place, block in enumerate(row) if block), None)
        if slide and passed is not None:
            self.release([row[passed]], again=True)
            row[passed] = 0
        new = [[self.free.pop(0)] for _ in range(self.groups)]
        for (block,) in new:
            if block in self.cached:
                self.tell(BlockEvicted(block, [self.cached.pop(block)]))
            self.ref[block] = 1
        self.tell(BlocksTaken([row[0] for row in new]))
        table = self.tables.setdefault(request, [[] for _ in range(self.groups)])
        for row, hit, more in zip(table, hits, new, strict=True):
            row += hit + more
        self.tell(SlotsAllocated(request, 1, 0, new, hits, len(self.free)))

    def release(self, blocks, again=False):
        """``again``: to be taken next, as vLLM does with blocks that are not cached."""
        for block in blocks:
            self.ref[block] -= 1
            if not self.ref[block]:
                self.free.insert(0 if again else len(self.free), block)
        self.tell(BlocksFreed(blocks, [self.ref[block] for block in blocks]))

    def cache(self, request):
        for group, row in enumerate(self.tables.get(request, ())):
            if row and row[-1] and row[-1] not in self.cached:
                self.cached[row[-1]] = 1000 + self.number
                self.tell(BlocksCached(request, group, 0, [row[-1]], [self.cached[row[-1]]]))

    def end(self, request, preempted):
        table = self.tables.pop(request, None)
        if table is not None:
            self.release([block for row in table for block in reversed(row) if block])
            self.tell(RequestFreed(request))
            if preempted:
                self.tell(RequestPreempted(request, 4, len(self.free)))


REQUESTS = st.integers(0, 4)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), REQUESTS, st.none() | REQUESTS, st.integers(0, 3)),
        st.tuples(st.just("cache"), REQUESTS),
        st.tuples(st.just("end"), REQUESTS, st.booleans()),
        st.tuples(st.just("frame")),
        st.tuples(st.just("reset")),
    ),
    max_size=80,
)


@given(actions=ACTIONS, groups=st.integers(1, 3))
def test_frames_give_back_the_pool_and_the_tables(actions, groups):
    changes = PoolChanges()
    story = Story(changes, groups)
    expected = []
    for what, *values in [*actions, ("frame",)]:
        if what == "frame":
            changes.close_frame()
            refs = [changes.state.ref_cnts.get(block, 0) for block in range(SIZE)]
            tables = {r: [list(row) for row in t] for r, t in changes.state.tables.items()}
            expected.append((column_of(changes.state, 0).to_dict(), refs, tables))
            story.frame += 1
        elif what == "reset":
            story.cached.clear()
            story.tell(PrefixCacheReset(True))
        else:
            getattr(story, what)(*values)
    made = changes.to_dict()
    owners, counts, refs = [-2] * SIZE, [0] * SIZE, [0] * SIZE
    starts = [*made["starts"], len(made["block"])]
    for frame, (column, ref_cnts, tables) in enumerate(expected):
        for i in range(starts[frame], starts[frame + 1]):
            block = made["block"][i]
            owners[block], counts[block] = made["owner"][i], made["count"][i]
            refs[block] = made["ref"][i]
            assert made["since"][i] <= story.number
        assert column["owners"] == owners
        assert column["shared"] == [block for block, count in enumerate(counts) if count > 1]
        assert ref_cnts == refs
        assert tables == {
            r: t for r in changes.tables if any(t := table_at(changes, r, frame, groups))
        }


def table_at(changes, request, frame, groups):
    """As the report's script folds it."""
    rows = [[] for _ in range(groups)]
    for when, _, group, first, blocks in changes.tables[request]:
        if when <= frame:
            rows[group][first:] = blocks
    return rows
