"""Another event, layer, expert or rows than the scan would choose, named by the user."""

from __future__ import annotations

from collections.abc import Sequence

from mwtool.errors import BadValue
from mwtool.massive import MassiveWeights
from mwtool.scan.capture import LayerState, Part
from mwtool.scan.definitions import Event, Write, write_at
from mwtool.scan.ranking import Ranker, carrier
from mwtool.scan.settings import ByHand


def ranked_by_hand(
    by_hand: ByHand,
    ranker: Ranker,
    states: Sequence[LayerState],
    *,
    events: Sequence[Event],
    massive: Event | None,
    dimensions: Sequence[int],
) -> MassiveWeights:
    """The rows the user asked for. massive: the event the definitions choose, unless chosen otherwise.

    Raises BadValue where there is no such event, expert or row.
    """
    layer, write = _place(by_hand, states, events, massive, dimensions)
    state = states[layer]
    part = carrier(state, write.dimension) if by_hand.expert is None else _routed(state, by_hand.expert)
    width = part.intermediate.numel()
    outside = next((row for row in by_hand.indices if not 0 <= row < width), None)
    if outside is not None:
        raise BadValue(f"row {outside} does not exist; {part.ffn.module} in layer {layer} has rows 0 to {width - 1}")
    rows = ranker.rows(state, part, write, by_hand.indices or ranker.top(part))
    if not by_hand.indices:
        ranker.check(rows, part)
    return rows


def _place(
    by_hand: ByHand,
    states: Sequence[LayerState],
    events: Sequence[Event],
    massive: Event | None,
    dimensions: Sequence[int],
) -> tuple[int, Write]:
    if by_hand.event is not None:
        if not 0 <= by_hand.event < len(events):
            found = f"{len(events)} events, 0 to {len(events) - 1}" if events else "no events"
            raise BadValue(f"there is no event {by_hand.event}; the scan found {found}")
        return events[by_hand.event].layer, events[by_hand.event]
    if by_hand.layer is None:
        if massive is None:
            raise BadValue("the scan found no massive layer to take rows of; name one with --layer or --event")
        return massive.layer, massive
    own = next((event for event in events if event.layer == by_hand.layer), None)
    return by_hand.layer, own or write_at(states, by_hand.layer, dimensions)


def _routed(state: LayerState, expert: int) -> Part:
    part = next((part for part in state.parts if part.ffn.expert == expert), None)
    if part is None:
        routed = sorted(part.ffn.expert for part in state.parts if part.ffn.expert is not None)
        if not routed:
            raise BadValue(f"layer {state.layer} has one dense feed-forward network; there is no expert {expert}")
        raise BadValue(f"bos is not routed to expert {expert} of layer {state.layer} but to {routed}; expected one")
    return part
