"""Perfetto's track events as a stream of packets: tracks, slices, counters, flows, interned names.

Follows: protos/perfetto/trace/track_event of the ``perfetto`` package. A packet is written as it is
made; what stays in memory are the names, each of which is spelled out once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import (
    BuiltinClock,
    TracePacket,
    TrackDescriptor,
    TrackEvent,
)

SEQUENCE = 1
"""All packets are of one sequence: they share the names."""

Facts = Mapping[str, Any]
"""What the panel of a slice shows: numbers and texts by name."""


class TrackEvents:
    """Writes to ``out``. Times are nanoseconds of the monotonic clock."""

    def __init__(self, out: BinaryIO, monotonic_ns: int = 0, unix_ns: int = 0) -> None:
        self._out = out
        self._uuid = 0
        self._names: dict[str, int] = {}
        self._categories: dict[str, int] = {}
        self._fact_names: dict[str, int] = {}
        self.num_slices = self.num_counters = self.num_flows = self.num_tracks = 0
        first = TracePacket(
            trusted_packet_sequence_id=SEQUENCE,
            sequence_flags=TracePacket.SEQ_INCREMENTAL_STATE_CLEARED,
            first_packet_on_sequence=True,
        )
        first.trace_packet_defaults.timestamp_clock_id = BuiltinClock.BUILTIN_CLOCK_MONOTONIC
        snapshot = first.clock_snapshot
        snapshot.primary_trace_clock = BuiltinClock.BUILTIN_CLOCK_MONOTONIC
        snapshot.clocks.add(
            clock_id=BuiltinClock.BUILTIN_CLOCK_MONOTONIC, timestamp=max(0, monotonic_ns)
        )
        if unix_ns > 0:
            # The time of day of every slice follows from this pair.
            snapshot.clocks.add(clock_id=BuiltinClock.BUILTIN_CLOCK_REALTIME, timestamp=unix_ns)
        self._write(first)

    # Tracks -----------------------------------------------------------------------------

    def process(self, name: str, pid: int, labels: Iterable[str] = ()) -> int:
        """A process; its uuid is the parent of its tracks."""
        packet, track = self._track()
        track.process.pid = pid
        track.process.process_name = name
        track.process.process_labels.extend(labels)
        self._write(packet)
        return track.uuid

    def thread(self, name: str, pid: int, tid: int) -> int:
        """A thread of the process with that pid."""
        packet, track = self._track()
        track.thread.pid, track.thread.tid, track.thread.thread_name = pid, tid, name
        self._write(packet)
        return track.uuid

    def track(self, name: str, parent: int, by_time: bool = False) -> int:
        """A track below another. Those below it are shown by name, or by when they begin.

        What is below a process is shown by name whatever is said.
        """
        packet, track = self._track()
        track.name, track.parent_uuid = name, parent
        if by_time:
            track.child_ordering = TrackDescriptor.CHRONOLOGICAL
        self._write(packet)
        return track.uuid

    def counter(self, name: str, parent: int, unit: str) -> int:
        """A curve; those of one unit have one scale, so that they can be compared."""
        packet, track = self._track()
        track.name, track.parent_uuid = name, parent
        track.counter.unit_name = track.counter.y_axis_share_key = unit
        self._write(packet)
        return track.uuid

    def _track(self) -> tuple[TracePacket, TrackDescriptor]:
        self._uuid += 1
        self.num_tracks += 1
        packet = TracePacket(trusted_packet_sequence_id=SEQUENCE)
        packet.track_descriptor.uuid = self._uuid
        return packet, packet.track_descriptor

    # Events -----------------------------------------------------------------------------

    def begin(
        self,
        track: int,
        at_ns: int,
        name: str,
        category: str,
        facts: Facts | None = None,
        flows: Iterable[int] = (),
        ends: Iterable[int] = (),
    ) -> None:
        """Open a slice; ``flows`` are arrows that leave it or pass through, ``ends`` arrive."""
        packet, event = self._event(TrackEvent.TYPE_SLICE_BEGIN, track, at_ns)
        event.name_iid = self._interned(packet, "event_names", self._names, name)
        event.category_iids.append(
            self._interned(packet, "event_categories", self._categories, category)
        )
        if facts:
            self._say(packet, event, facts)
        event.flow_ids.extend(flows)
        event.terminating_flow_ids.extend(ends)
        self.num_flows += len(event.terminating_flow_ids)
        self.num_slices += 1
        self._write(packet)

    def end(self, track: int, at_ns: int, facts: Facts | None = None) -> None:
        """Close the slice that was opened last."""
        packet, event = self._event(TrackEvent.TYPE_SLICE_END, track, at_ns)
        if facts:
            self._say(packet, event, facts)
        self._write(packet)

    def slice(
        self, track: int, at_ns: int, dur_ns: int, name: str, category: str, **more: Any
    ) -> None:
        self.begin(track, at_ns, name, category, **more)
        self.end(track, at_ns + dur_ns)

    def value(self, track: int, at_ns: int, value: int) -> None:
        """A counter's value from then on."""
        packet, event = self._event(TrackEvent.TYPE_COUNTER, track, at_ns)
        event.counter_value = value
        self.num_counters += 1
        self._write(packet)

    def _event(self, kind: int, track: int, at_ns: int) -> tuple[TracePacket, TrackEvent]:
        packet = TracePacket(
            timestamp=max(0, at_ns),
            trusted_packet_sequence_id=SEQUENCE,
            sequence_flags=TracePacket.SEQ_NEEDS_INCREMENTAL_STATE,
        )
        event = packet.track_event
        event.type, event.track_uuid = kind, track
        return packet, event

    def _interned(self, packet: TracePacket, table: str, known: dict[str, int], name: str) -> int:
        number = known.get(name)
        if number is None:
            number = known[name] = len(known) + 1
            getattr(packet.interned_data, table).add(iid=number, name=name)
        return number

    def _say(self, packet: TracePacket, event: TrackEvent, facts: Facts) -> None:
        for name, value in facts.items():
            if value is None:
                continue
            number = self._interned(packet, "debug_annotation_names", self._fact_names, name)
            if isinstance(value, bool):
                event.debug_annotations.add(name_iid=number, bool_value=value)
            elif isinstance(value, int):
                event.debug_annotations.add(name_iid=number, int_value=value)
            else:
                event.debug_annotations.add(name_iid=number, string_value=str(value))

    def _write(self, packet: TracePacket) -> None:
        """Frame it as field 1 of the message ``Trace``."""
        data = packet.SerializeToString()
        head, size = bytearray(b"\x0a"), len(data)
        while size > 127:
            head.append(size & 127 | 128)
            size >>= 7
        head.append(size)
        self._out.write(bytes(head) + data)
