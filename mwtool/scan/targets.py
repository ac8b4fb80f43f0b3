"""Which rows are attacked, or dropped from: the massive ones, those of events or layers, or those the user names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from mwtool.architecture.layout import FFN
from mwtool.architecture.validate import ffn_at
from mwtool.errors import BadValue
from mwtool.massive import MassiveWeights, RankedEvent, load_events, load_massive
from mwtool.models.load import Loaded
from mwtool.scan.capture import LayerState, Part
from mwtool.scan.loaded import scan_loaded
from mwtool.scan.ranking import massive_count
from mwtool.scan.scanner import Scan
from mwtool.scan.settings import Choice, Settings

RANKED = 16
"""Rows ranked at least, so that random controls avoid all truly massive ones whatever k is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Ranked rows of one FFN.

    indices: by falling |z| of bos, or as given; what is attacked are the first k. All that are truly massive are
        among them, as far as they were ranked.
    count: how many of them are truly massive; None where that is not known.
    avoided: rows that are no random control either: truly massive ones that are not among `indices`.
    ranked: what the scan says of these rows; None where they were named by hand or are not those of an event.
    event: the event they are those of; None as above, or where the scan's massive rows were themselves named by hand.
    """

    layer: int
    ffn: FFN
    indices: tuple[int, ...]
    count: int | None = None
    avoided: tuple[int, ...] = ()
    ranked: MassiveWeights | None = None
    event: RankedEvent | None = None

    @property
    def module(self) -> str:
        """The FFN's path."""
        return self.ffn.module

    @property
    def expert(self) -> int | None:
        """The routed expert; None if dense."""
        return self.ffn.expert


Group = tuple[Target, ...]
"""Places that are attacked together, or dropped from together."""


def find_targets(
    loaded: Loaded,
    choice: Choice,
    k: int,
    settings: Settings | None = None,
    *,
    scanned: Callable[[Settings], Scan] | None = None,
) -> tuple[tuple[Group, ...], tuple[str, ...]]:
    """The rows chosen, at least k of each FFN, as groups of places that belong together, and what the user should know.

    scanned: how to scan the model; by default as `scan_loaded` does.
    Raises BadValue where there are no massive rows, or fewer than k, or no such event, layer, expert or row.
    """
    narrowest = min(ffn.width(loaded.base) for layer in loaded.layers for ffn in layer.ffns)
    settings = replace(settings or Settings(), k=max(k, min(RANKED, narrowest)))

    def scan() -> Scan:
        return scan_loaded(loaded, settings) if scanned is None else scanned(settings)

    if choice.layers and choice.indices:
        return ((_given(loaded, choice, choice.layers[0], choice.expert, k),),), ()
    if choice.each_layer or choice.layers:
        for layer in choice.layers:  # refused before the scan
            ffn_at(loaded.layers, layer, _first_expert(loaded, layer) if choice.expert is None else choice.expert)
        found = scan()
        group = tuple(_at_layer(loaded, found, layer, choice.expert, k) for layer in choice.layers)
        each = tuple((_top(loaded, state, None, k),) for state in found.states) if choice.each_layer else (group,)
        return each, found.notes
    if choice.events:
        return _of_events(loaded, choice, k, scan)
    if choice.file is not None:
        saved = load_massive(choice.file, loaded.identity)
        massive, events, notes = saved.massive, saved.events, saved.notes
    else:
        found = scan()
        massive, events, notes = found.massive, _ranked(found), found.notes
    if massive is None:
        raise BadValue(
            f"{_subject(loaded, choice)} has no massive weights; name rows yourself with --layer N --indices I,J, or "
            f"compare all layers with mwtool ablate --each-layer"
        )
    target, more = _from_ranked(loaded, massive, choice, k)
    if target.ranked is not None:
        target = replace(target, event=next((one for one in events if one.rows == massive), None))
    return ((target,),), (*notes, *more)


def _ranked(scan: Scan) -> tuple[RankedEvent, ...]:
    """The events of a scan with their numbers."""
    return tuple(
        RankedEvent(event=number, kind=event.kind, rows=event.rows) for number, event in enumerate(scan.events)
    )


def _of_events(
    loaded: Loaded, choice: Choice, k: int, scan: Callable[[], Scan]
) -> tuple[tuple[Group, ...], tuple[str, ...]]:
    if choice.file is not None:
        saved = load_events(choice.file, loaded.identity)
        source, found, notes = str(choice.file), saved.events, saved.notes
    else:
        now = scan()
        source, found, notes = f"the scan of {_subject(loaded, choice)}", _ranked(now), now.notes
    events = {one.event: one for one in found}
    if isinstance(choice.events, str):
        chosen = [event for event in events.values() if choice.events in ("all", event.kind)]
    else:
        absent = next((number for number in choice.events if number not in events), None)
        if absent is not None:
            raise BadValue(f"there is no event {absent}; {source} has {_listed(events)}")
        chosen = [events[number] for number in choice.events]
    if not chosen:
        raise BadValue(f"--event {choice.events}: {source} has no such event; name a --layer")
    made = [(event, *_from_ranked(loaded, event.rows, choice, k)) for event in chosen]
    group = tuple(target if target.ranked is None else replace(target, event=event) for event, target, _ in made)
    return (group,), (*notes, *dict.fromkeys(note for *_, more in made for note in more))


def _listed(events: Collection[int]) -> str:
    """`events 0 to 3`, `event 2`, `events 1, 3`, `no events`."""
    numbers = sorted(events)
    if len(numbers) > 1 and numbers == list(range(len(numbers))):
        return f"events 0 to {numbers[-1]}"
    several = "s" if len(numbers) > 1 else ""
    return f"event{several} {', '.join(map(str, numbers))}" if numbers else "no events"


def _from_ranked(loaded: Loaded, massive: MassiveWeights, choice: Choice, k: int) -> tuple[Target, tuple[str, ...]]:
    """The rows of an event, or those the user named in its layer."""
    expert = massive.expert if choice.expert is None else choice.expert
    if choice.indices:
        target = _given(loaded, choice, massive.layer, expert, k)
        same = expert == massive.expert
        return replace(target, avoided=massive.indices[: massive.count] if same else ()), ()
    if expert != massive.expert:
        raise BadValue(
            f"the massive rows are those of expert {massive.expert}; name rows of expert {expert} with --indices"
        )
    if k > len(massive.indices):
        raise BadValue(f"k is {k}; {choice.file or massive.module} ranks {len(massive.indices)} rows: scan with -k {k}")
    notes = (_unranked(massive),) if massive.count > len(massive.indices) else ()
    indices = massive.indices[: max(k, massive.count)]
    return Target(
        layer=massive.layer, ffn=loaded.ffn(massive), indices=indices, count=massive.count, ranked=massive
    ), notes


def _at_layer(loaded: Loaded, scan: Scan, layer: int, expert: int | None, k: int) -> Target:
    """The rows of the event in a layer, where it has one of this expert; else those of largest |z|."""
    for event in _ranked(scan):
        rows = event.rows
        if rows.layer == layer and expert in (None, rows.expert) and k <= len(rows.indices):
            return replace(_from_ranked(loaded, rows, Choice(), k)[0], event=event)
    return _top(loaded, scan.states[layer], expert, k)


def _subject(loaded: Loaded, choice: Choice) -> str:
    if loaded.on == "merged" and choice.file is None:
        return f"{loaded.source.name} merged with {loaded.source.adapter}"
    return loaded.source.name


def _unranked(massive: MassiveWeights) -> str:
    return (
        f"{massive.count} rows are truly massive and {len(massive.indices)} are ranked: random controls may be among "
        f"the others"
    )


def _top(loaded: Loaded, state: LayerState, expert: int | None, k: int) -> Target:
    """The rows of largest |z| in a layer: of the expert asked for, else of the network that gives the most."""
    parts = [part for part in state.parts if expert is None or part.ffn.expert == expert]
    if not parts:
        routed = sorted(part.ffn.expert for part in state.parts if part.ffn.expert is not None)
        raise BadValue(
            f"bos is not routed to expert {expert} of layer {state.layer} but to {routed}; name its rows with --indices"
        )
    part = max(parts, key=lambda one: float(one.output.abs().max()))
    width = part.intermediate.numel()
    if k > width:
        raise BadValue(
            f"k is {k}; {part.ffn.module} in layer {state.layer} has {width} rows: k must be from 0 to {width}"
        )
    order = part.intermediate.abs().argsort(descending=True, stable=True).tolist()
    return Target(
        layer=state.layer,
        ffn=part.ffn,
        indices=tuple(order[: max(k, 1)]),
        avoided=tuple(order[: _carrying(loaded, part)]),
    )


def _carrying(loaded: Loaded, part: Part) -> int:
    """How many rows are truly massive for the largest entry of the output; 0 where so many are that none stands out."""
    down = part.ffn.down.read(loaded.base)  # (H, I)
    if down.is_meta:
        return 0
    count = massive_count(part.intermediate, down[int(part.output.abs().argmax())])
    return count if count <= RANKED else 0


def _given(loaded: Loaded, choice: Choice, layer: int, expert: int | None, k: int) -> Target:
    ffn = ffn_at(loaded.layers, layer, expert)
    width = ffn.width(loaded.base)
    outside = [row for row in choice.indices if not 0 <= row < width]
    if outside:
        raise BadValue(f"row {outside[0]} does not exist; {ffn.module} in layer {layer} has rows 0 to {width - 1}")
    if k > len(choice.indices):
        raise BadValue(f"k is {k} and --indices names {len(choice.indices)} rows; name more, or lower -k")
    return Target(layer=layer, ffn=ffn, indices=choice.indices)


def _first_expert(loaded: Loaded, layer: int) -> int | None:
    ffns: Sequence[FFN] = loaded.layers[layer].ffns if 0 <= layer < len(loaded.layers) else ()
    return ffns[0].expert if ffns else None
