"""What follows from two scans side by side, in sentences, and how their making differs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mwtool.files.scan_schema import ScanDocument
    from mwtool.scan.comparison.compare import ComparedEvent, ComparedRow


def verdict(
    a: ScanDocument, b: ScanDocument, massive: Sequence[ComparedRow], events: Sequence[ComparedEvent]
) -> Iterator[str]:
    """What the lists made of A are worth for B. massive: rows of the massive layer, where it is the same in both."""
    if a.shape != b.shape:
        yield (
            f"The models differ in shape ({_unlike(a, b)}), so that layers, dimensions and rows do not correspond: "
            f"only the summaries can be compared."
        )
        return
    one, other = a.massive, b.massive
    if one is None or other is None:
        yield _absent(a, b)
    elif one.layer != other.layer:
        yield f"The massive layer is {one.layer} in A and {other.layer} in B: rows of A do not serve B; scan B itself."
    else:
        yield _same_layer(one.layer, massive)
    if events:
        yield _events(a, b, events)


def _unlike(a: ScanDocument, b: ScanDocument) -> str:
    names = {"layers": "layers", "hidden_size": "hidden", "intermediate_size": "FFN", "experts": "experts"}
    found = {name: (getattr(a.shape, key), getattr(b.shape, key)) for key, name in names.items()}
    return ", ".join(f"{name} {_count(x)} and {_count(y)}" for name, (x, y) in found.items() if x != y)


def _count(value: int | None) -> str:
    return "none" if value is None else f"{value:,}"


def _absent(a: ScanDocument, b: ScanDocument) -> str:
    if a.massive is None and b.massive is None:
        return f"Neither has a massive layer ({_why(a)}; {_why(b)})."
    if a.massive is None:
        assert b.massive is not None
        return f"A has no massive layer ({_why(a)}); that of B is {b.massive.layer}."
    return f"The massive layer of A is {a.massive.layer}; B has none ({_why(b)}), so rows of A do not serve B."


def _why(scan: ScanDocument) -> str:
    return scan.absence or "none was found"


def _same_layer(layer: int, rows: Sequence[ComparedRow]) -> str:
    in_a = [one for one in rows if one.fate != "new"]
    lost = [one.row for one in rows if one.fate == "lost"]
    new = [one.row for one in rows if one.fate == "new"]
    opening = f"The massive layer is {layer} in both"
    if not lost and not new:
        which = "row carries it" if len(rows) == 1 else f"{len(rows)} rows carry it"
        order = ", in another order" if any(one.fate == "moved" for one in rows) else ""
        change = f"; the largest |z| of B is {_change(rows)} that of A" if rows else ""
        return f"{opening}, and the same {which}{order}{change}: what is done to these rows in A can be done in B."
    gone = f" not {_listed(lost)}" if lost else ""
    come = f" {_listed(new)} besides" if new else ""
    kept = len(in_a) - len(lost)
    both = " but" if gone and come else ""
    return (
        f"{opening}; of the {len(in_a)} rows that carry it in A, {kept} carry it in B,{gone}{both}{come}: take the "
        f"rows of B from its own scan."
    )


def _change(rows: Sequence[ComparedRow]) -> str:
    one, other = max(row.z_a or 0.0 for row in rows), max(row.z_b or 0.0 for row in rows)
    return f"{other / one:.2f} times" if one > 0 else "above"


def _events(a: ScanDocument, b: ScanDocument, events: Sequence[ComparedEvent]) -> str:
    both = [one for one in events if one.found_in == "both"]
    lost = [f"layer {one.layer} of dimension {one.dimension}" for one in events if one.found_in == "a"]
    new = [f"layer {one.layer} of dimension {one.dimension}" for one in events if one.found_in == "b"]
    if both and not lost:
        said = f"All {len(both)} events of A are events of B" if len(both) > 1 else "A's one event is an event of B"
    else:
        said = f"{len(both)} of A's {len(a.events)} events are events of B"
    said += f" (lost: {_listed(lost)})" if lost else ""
    said += f" (new: {_listed(new)})" if new else ""
    carry = [row for one in both for row in one.rows if row.fate != "new"]
    if carry:
        kept = sum(row.fate != "lost" for row in carry)
        said += f", where {kept} of the {len(carry)} rows that carry them in A do so in B"
    same = {one.layer for one in a.events} == {one.layer for one in b.events}
    return f"{said}: the layers to protect when quantizing {'are the same' if same else 'differ'}."


def _listed(values: Sequence[object]) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def differences(a: ScanDocument, b: ScanDocument) -> Iterator[str]:
    """How the scans were made differently, which may explain what differs between them."""
    if a.model_type != b.model_type:
        yield f"A is a {a.model_type}, B a {b.model_type}: equal numbers of layers and rows are not the same ones"
    if a.bos.id != b.bos.id:
        yield f"A was fed token {a.bos.id} and B token {b.bos.id}: massive activations depend on the first token"
    if a.dtype != b.dtype:
        yield f"A was computed in {a.dtype} and B in {b.dtype}: values differ from the third digit on by that alone"
    if a.thresholds != b.thresholds:
        yield "the scans were made with different thresholds: an event of one may be below those of the other"
    for name, scan in (("A", a), ("B", b)):
        if scan.partial:
            yield f"{name} was scanned up to layer {scan.layers_walked - 1} only: later events are not in it"
        if scan.by_hand is not None:
            yield f"the rows of {name} were chosen by hand (--event, --layer, --expert or --indices)"
