"""The card of a scan on the Hub: README.md of a dataset repository that holds the document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

DOCUMENT = "scan.json"


def scan_card(document: Mapping[str, Any]) -> str:
    """README.md: what was scanned, the massive layer and its rows, the events, and how to use the document.

    document: of schema mwtool.scan/2. A folder of this machine appears by its last name alone, as a card is published.
    """
    name = public_name(document)
    lines = ["---", *_based_on(document), "tags: [mwtool, massive-activations, interpretability]", "---", ""]
    lines += [f"# Massive weights of {name}", ""]
    made = f"by mwtool {document['mwtool_version']}, schema `{document['schema']}`."
    lines += [
        f"`{DOCUMENT}` is a scan of {name} ({document['model_type']}, {document['dtype']}) {made}",
        "",
        *_massive(document),
        "",
        *_events(document),
    ]
    lines += [
        "## Use",
        "",
        "```sh",
        f"mwtool ablate MODEL --massive {DOCUMENT}    # measure what the model loses without these rows",
        f"mwtool export {DOCUMENT} --to TOOL          # what to protect, in the syntax of a quantization tool",
        f"mwtool compare {DOCUMENT} OTHER             # beside another model of the same shape",
        "```",
        "",
        "Layers and rows count from 0.",
        "",
    ]
    return "\n".join(lines)


def published_scan(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document without this machine's folders: the model by its last name, and no command."""
    return {**document, "model": public_name(document), "command": None}


def public_name(document: Mapping[str, Any]) -> str:
    """The model's id on the Hub, or the last name of its folder or file."""
    model = str(document["model"])
    return model if document["revision"] is not None else Path(model).name or model


def _based_on(document: Mapping[str, Any]) -> Iterator[str]:
    if document["revision"] is not None:  # a model of the Hub, which links to the scan then
        yield f"base_model: {document['model']}"


def _massive(document: Mapping[str, Any]) -> Iterator[str]:
    massive = document["massive"]
    if massive is None:
        yield f"No massive layer was found: {document['absence']}."
        return
    rows = massive["indices"][: max(1, massive["count"])]
    yield (
        f"**Massive layer {massive['layer']}** (`{massive['module']}`), dimension {massive['dimension']}: "
        f"{massive['count']} rows carry it; |z| of {massive['magnitudes'][0]:,.4g}. Rows: {', '.join(map(str, rows))}."
    )


def _events(document: Mapping[str, Any]) -> Iterator[str]:
    if document["events"]:
        yield from (
            "| layer | kind | dimension | before | after | top row | \\|z\\| |",
            "|---|---|---|---|---|---|---|",
        )
        for one in document["events"]:
            rows = one["rows"]
            yield (
                f"| {one['layer']} | {one['kind']} | {one['dimension']} | {one['before']:,.4g} | {one['after']:,.4g} | "
                f"{rows['indices'][0]} | {rows['magnitudes'][0]:,.4g} |"
            )
        yield ""
