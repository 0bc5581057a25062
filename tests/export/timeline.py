"""Reads a Perfetto trace by its schema and finds what a viewer would stumble over."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackEvent


@dataclass
class Slice:
    track: int
    name: str
    begin: int
    end: int
    facts: dict
    flows: list[int]
    ends: list[int]


@dataclass
class Timeline:
    tracks: dict = field(default_factory=dict)
    slices: list[Slice] = field(default_factory=list)
    counters: dict = field(default_factory=lambda: defaultdict(list))
    faults: list[str] = field(default_factory=list)

    def name_of(self, uuid: int) -> str:
        track = self.tracks[uuid]
        return track.name or track.process.process_name or track.thread.thread_name

    def on(self, name: str) -> list[Slice]:
        """The slices on all tracks of that name, by time."""
        found = [each for each in self.slices if self.name_of(each.track) == name]
        return sorted(found, key=lambda each: (each.begin, -each.end))

    def values(self, name: str) -> list[int]:
        (uuid,) = [u for u, track in self.tracks.items() if track.name == name]
        return [value for _, value in sorted(self.counters[uuid], key=lambda pair: pair[0])]


def read(data: bytes) -> Timeline:
    """Parse and judge: names known before use, tracks with parents, slices nested, flows in pairs."""
    made, trace = Timeline(), Trace()
    assert len(data) == trace.ParseFromString(data)
    names: dict[str, dict[int, str]] = defaultdict(dict)
    open_: dict[int, list[Slice]] = defaultdict(list)
    events: dict[int, list[tuple[int, int]]] = defaultdict(list)
    assert trace.packet[0].first_packet_on_sequence
    for packet in trace.packet:
        assert packet.trusted_packet_sequence_id == trace.packet[0].trusted_packet_sequence_id
        for table in ("event_names", "event_categories", "debug_annotation_names"):
            for entry in getattr(packet.interned_data, table):
                if entry.iid in names[table]:
                    made.faults.append(f"{table} {entry.iid} is given twice")
                names[table][entry.iid] = entry.name
        if packet.HasField("track_descriptor"):
            track = packet.track_descriptor
            if track.uuid in made.tracks:
                made.faults.append(f"track {track.uuid} is there twice")
            if track.parent_uuid and track.parent_uuid not in made.tracks:
                made.faults.append(f"{track.name}: its parent is not there")
            made.tracks[track.uuid] = track
        if packet.HasField("track_event"):
            _event(made, packet, names, open_, events)
    _judge(made, open_, events)
    return made


def _event(made, packet, names, open_, events):
    event, at = packet.track_event, packet.timestamp
    if event.track_uuid not in made.tracks:
        made.faults.append(f"an event on track {event.track_uuid}, which is not there yet")
    facts = {
        names["debug_annotation_names"][each.name_iid]: getattr(each, each.WhichOneof("value"))
        for each in event.debug_annotations
    }
    if event.type == TrackEvent.TYPE_COUNTER:
        made.counters[event.track_uuid].append((at, event.counter_value))
    elif event.type == TrackEvent.TYPE_SLICE_BEGIN:
        begun = Slice(
            event.track_uuid, names["event_names"][event.name_iid], at, -1, facts,
            list(event.flow_ids), list(event.terminating_flow_ids),
        )  # fmt: skip
        open_[event.track_uuid].append(begun)
        made.slices.append(begun)
        events[event.track_uuid].append((at, 1))
    else:
        if not open_[event.track_uuid]:
            made.faults.append(f"an end without a beginning on {made.name_of(event.track_uuid)}")
            return
        ended = open_[event.track_uuid].pop()
        ended.end = at
        ended.facts |= facts
        events[event.track_uuid].append((at, -1))


def _judge(made, open_, events):
    for uuid, left in open_.items():
        if left:
            made.faults.append(f"{left[0].name} on {made.name_of(uuid)} does not end")
    pids = [t.process.pid for t in made.tracks.values() if t.HasField("process")]
    if len(set(pids)) != len(pids) or not all(pids):
        made.faults.append("two processes have one pid")
    for track in made.tracks.values():
        if track.HasField("thread") and track.thread.pid not in pids:
            made.faults.append(f"{track.thread.thread_name} is of no process")
    # A viewer sorts by time and takes each end for the slice opened last: it must find the same.
    for uuid, sequence in events.items():
        stack, seen = [], []
        for at, kind in sorted(sequence, key=lambda pair: pair[0]):
            if kind == 1:
                stack.append(at)
            elif stack:
                seen.append((stack.pop(), at))
            else:
                made.faults.append(f"{made.name_of(uuid)}: ends before it begins")
        mine = [(each.begin, each.end) for each in made.slices if each.track == uuid]
        if sorted(seen) != sorted(mine):
            made.faults.append(f"{made.name_of(uuid)}: slices overlap")
    leaves, arrives = defaultdict(list), defaultdict(list)
    for each in made.slices:
        for flow in each.flows:
            leaves[flow].append(each.begin)
        for flow in each.ends:
            arrives[flow].append(each.begin)
    for flow in leaves.keys() | arrives.keys():
        if len(leaves[flow]) != 1 or len(arrives[flow]) != 1 or leaves[flow] > arrives[flow]:
            made.faults.append(f"flow {flow} is not one arrow forward in time")
