"""Compare trained runs and choose the one that is bundled, by the rule on the model card.

    python -m mwtool.demo.choose runs/* --output runs.json

Each run is scanned, and its top rows are zeroed and retained, by the same functions as
`mwtool scan` and `mwtool ablate --no-controls`; all perplexities are those of `ppl:demo`.
Prints the card's table and writes every figure.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mwtool.ablation.sweep import Sweep, ablate
from mwtool.evaluation.tasks import parse_tasks
from mwtool.models.load import load
from mwtool.scan.definitions import median
from mwtool.scan.loaded import scan_loaded
from mwtool.scan.scanner import Scan
from mwtool.scan.targets import Choice, find_targets

KS = (0, 1, 3, 5)
HEAD = ["run", "lr", "decay", "batch", "shape", "seed", "M tokens", "layer", "rows", "hidden top-1 / median"]
HEAD += ["perplexity", "zero 1 / 3 / 5", "retain 1 / 5", "all zero"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders that mwtool.demo.train wrote")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    args = parser.parse_args()
    runs = [figures(folder, args.device) for folder in args.runs]
    best = chosen(runs)
    for run in runs:
        run["chosen"] = run is best
    if args.output is not None:
        args.output.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")
    print(table(runs))


def chosen(runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The rule: layer not the first, zeroing 5 rows hurts more than retaining only them, largest zeroing ratio."""
    fit = [one for one in runs if one.get("layer") and one["zero"]["5"] > one["retain"]["5"]]
    return max(fit, key=lambda one: float(one["zero"]["5"] / one["perplexity"]), default=None)


def figures(folder: Path, device: str) -> dict[str, Any]:
    """What a run was trained with, and what grew in it."""
    record = json.loads((folder / "train.json").read_text())
    loaded = load(str(folder), device=device)
    scan = scan_loaded(loaded)
    known = {"run": folder.name, **{key: value for key, value in record.items() if key != "losses"}}
    if scan.massive is None:
        return {**known, "layer": None}
    targets, _ = find_targets(loaded, Choice(), max(KS))
    found = ablate(loaded, targets, parse_tasks(["ppl:demo"]), Sweep(ks=KS, draws=0))
    values = {(run.attack.mode, run.attack.k): run.measured[0].value for run in found.runs}
    return {
        **known,
        **grown(scan),
        "perplexity": found.baseline[0].value,
        "zero": {str(k): values["zero", k] for k in KS},
        "retain": {str(k): values["retain", k] for k in KS},
    }


def grown(scan: Scan) -> dict[str, Any]:
    """The massive layer and how far it stands out."""
    massive = scan.massive
    assert massive is not None, "the caller has looked"
    hidden = scan.states[massive.layer].hidden
    return {
        "layer": massive.layer,
        "indices": list(massive.indices),
        "count": massive.count,
        "intermediate": {"top": massive.magnitudes[0], "median": massive.median},
        "hidden": {"top": float(hidden.abs().max()), "median": median(hidden)},
    }


def table(runs: list[dict[str, Any]]) -> str:
    """As it stands on the card, in Markdown."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + " --- |" * len(HEAD)]
    return "\n".join([*lines, *(f"| {' | '.join(row(run))} |" for run in runs)])


def row(run: dict[str, Any]) -> list[str]:
    s = run["settings"]
    tokens = run["steps"] * s["batch_size"] * s["context"] / 1e6
    shape = f"{s['hidden_size']} x {s['layers']}, FFN {s['intermediate_size']}"
    name = f"**{run['run']}**" if run.get("chosen") else run["run"]
    first = [
        name,
        f"{s['learning_rate']:g}",
        f"{s['weight_decay']:g}",
        str(s["batch_size"]),
        shape,
        str(s["seed"]),
        f"{tokens:.0f}",
    ]
    if run["layer"] is None:
        return [*first, "none", *[""] * 6]
    zero, retain, top = run["zero"], run["retain"], run["hidden"]
    return [
        *first,
        str(run["layer"]),
        str(run["count"]),
        f"{top['top']:,.0f} / {top['median']:.3g}",
        f"{run['perplexity']:.2f}",
        " / ".join(f"{zero[k]:.2f}" for k in ("1", "3", "5")),
        " / ".join(f"{retain[k]:.2f}" for k in ("1", "5")),
        f"{retain['0']:.2f}",
    ]


if __name__ == "__main__":
    main()
