"""A fine-tuning run as a document of schema mwtool.finetune/1 (docs/json.md), and as the adapter's model card."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mwtool.errors import BadValue
from mwtool.files.document import envelope, finite
from mwtool.finetune.config import SCHEMA
from mwtool.finetune.memory import Footprint
from mwtool.finetune.plan import Plan, few_steps
from mwtool.finetune.trainer import Trained
from mwtool.finetune.trial import Trial
from mwtool.massive import MassiveWeights, RankedRows

PLAN = "mwtool.finetune.plan/1"
RECORD = "macdrop.json"
"""The document's name beside the adapter; where it is, the run has ended."""
NAMED = 1000
"""Records that a document names at most, of those that were read and left out and of those that could not be read."""
_FOLDERS = re.compile(r"(?<![\w.:/\\<])(?:[A-Za-z]:[/\\]|~?/)(?:[^\s/\\|`'\",;()]+[/\\])*(?=[^\s/\\])")
"""The folders of an absolute path in a sentence; neither those of an address on the web nor the slash of `</s>`."""
_LOGGED = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "macdrop_p")


def finetune_document(
    plan: Plan, trained: Trained, *, device: str, command: str | None = None, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """The document, saved as `macdrop.json` beside the adapter. What is not finite is null, and a note says so."""
    from mwtool.files.schema import checked
    from mwtool.finetune.schema import FinetuneDocument

    log, nonfinite = _log(trained)
    document = {
        **_beginning(SCHEMA, plan, device=device, command=command),
        "how": trained.how,
        "rows": list(trained.rows),
        "processes": plan.processes,
        "steps": trained.steps,
        "steps_per_epoch": plan.per_epoch,
        "p": [trained.history[t] for t in sorted(trained.history)],
        "log": log,
        "measured": measured(log, trained),
        "notes": [*plan.notes, *few_steps(plan), *notes, *nonfinite],
    }
    return checked(FinetuneDocument, document)


def _log(trained: Trained) -> tuple[list[dict[str, Any]], list[str]]:
    """The logged losses, and a note on each key that was not finite in some of them."""
    kept = [entry for entry in trained.log if "loss" in entry or "eval_loss" in entry]
    log = [{name: finite(entry[name]) for name in _LOGGED if name in entry} for entry in kept]
    notes = []
    for name in _LOGGED:
        steps = [entry["step"] for entry in log if entry.get(name, 0) is None]
        if steps:
            where = f"1 logged step, {steps[0]}" if len(steps) == 1 else f"{len(steps)} logged steps from {steps[0]} on"
            notes.append(f"{name} was not finite at {where}: null in the log")
    return log, notes


def read_record(path: Path) -> dict[str, Any]:
    """A finished run's document. Raises BadValue where the file is none."""
    from mwtool.files.schema import read_document
    from mwtool.finetune.schema import FinetuneDocument

    try:
        return read_document(path, {SCHEMA: FinetuneDocument}, "mwtool finetune")[0]
    except BadValue as fault:
        raise BadValue(f"{fault}; remove it, and --resume finishes the run once more") from fault


def plan_document(
    plan: Plan, needed: Footprint, trial: Trial | None = None, *, before: float = 0.0, device: str = "meta"
) -> dict[str, Any]:
    """What `--dry-run --json` prints. before: seconds from the start of the process to the trial."""
    from mwtool.files.schema import checked
    from mwtool.finetune.schema import PlanDocument

    values = () if not plan.places else plan.recipe.curriculum.values(plan.steps, plan.per_epoch)
    document = {
        **_beginning(PLAN, plan, device=device),
        "processes": plan.processes,
        "steps": plan.steps,
        "steps_per_epoch": plan.per_epoch,
        "p": list(values),
        "parameters": needed.parameters,
        "trainable": needed.trainable,
        "memory": {
            "weights": needed.weights,
            "adapter": needed.adapter,
            "activations": needed.activations,
            "rows": needed.kept,
            "total": needed.total,
            "process": needed.process if trial is None else trial.process,
            "gpu": _gpu(needed, device) if trial is None else trial.gpu,
        },
        "step_seconds": None if trial is None else trial.step,
        "total_seconds": None if trial is None else before + trial.total(plan.steps, plan.per_epoch),
        "notes": [*plan.notes, *few_steps(plan)],
    }
    return checked(PlanDocument, document)


def _gpu(needed: Footprint, device: str) -> float | None:
    """Bytes on the GPU, where there is one and they are known."""
    return needed.total if device.startswith("cuda") and needed.activations is not None else None


def check_plan(plan: Plan) -> None:
    """Hold what is known before training against the model of its record. Raises BadValue where it does not fit."""
    from pydantic import ValidationError

    from mwtool.files.schema import complaint
    from mwtool.finetune.schema import Settings

    try:
        Settings.model_validate(plan.recipe.document())
    except ValidationError as fault:
        raise BadValue(f"this run could not be recorded: {complaint(fault)}") from fault


def _beginning(schema: str, plan: Plan, *, device: str, command: str | None = None) -> dict[str, Any]:
    """What a plan and what came of it begin with."""
    return {
        **envelope(
            schema,
            model=plan.source.name,
            revision=plan.source.revision,
            model_type=plan.skeleton.config.model_type,
            dtype=plan.recipe.dtype,
            device=device,
            seed=plan.recipe.seed,
            command=command,
        ),
        "data": data_document(plan),
        "settings": plan.recipe.document(),
        "massive": _place(plan.places[0]) if plan.places else None,
        "places": [_place(one) for one in plan.places],
    }


def data_document(plan: Plan) -> dict[str, Any]:
    """What was trained on, and what was not."""
    records = plan.records
    return {
        "name": plan.data.name,
        "form": plan.data.form,
        "digest": plan.digest,
        **records.counts(),
        "left_out": [
            *({"record": one.where, "reason": one.reason} for one in records.left_out[:NAMED]),
            *({"record": why, "reason": "unreadable"} for why in records.unreadable[:NAMED]),
        ],
        "date": None if plan.date is None else f"{plan.date:%Y-%m-%d}",
        "sequences": len(plan.train),
        "held_out": 0 if plan.held is None else len(plan.held),
        "trained_tokens": plan.train.trained_tokens,
    }


def measured(log: Sequence[dict[str, Any]], trained: Trained) -> dict[str, Any]:
    """The figures of the run: losses at its beginning and end, and the time of a step."""
    losses = [entry["loss"] for entry in log if "loss" in entry]
    held = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    return {
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "first_eval_loss": held[0] if held else None,
        "last_eval_loss": held[-1] if held else None,
        "step_seconds": trained.step_seconds,
        "macdrop_seconds": trained.macdrop_seconds,
    }


def model_card(document: dict[str, Any], base: str) -> str:
    """README.md of the adapter's folder: how to load it, every setting, and what was measured.

    base: the base model as PEFT finds it. Folders of this machine appear by their last name alone, because a card is
    published with the adapter.
    """
    peft = document["settings"]["peft"]
    name = {"lora": "LoRA", "dora": "DoRA"}[peft]
    dropped = document["massive"] is not None
    lines = [
        "---",
        *([] if _is_local(base) else [f"base_model: {base}"]),  # the Hub takes ids alone
        *("library_name: peft", "pipeline_tag: text-generation"),
        f"tags: [{peft}{', macdrop' if dropped else ''}]",
        "---",
        "",
        f"# {name} adapter of {document['model']}, trained {'with' if dropped else 'without'} MacDrop",
        "",
        *_loading(base),
        "",
        *_macdrop(document),
        "## Measured",
        "",
        *_table(("", "first", "last"), _figures(document["measured"])),
        "",
        "![loss and p over the steps](training.png)",
        "",
        "## Data",
        "",
        *_table(("", ""), ((key, value) for key, value in document["data"].items() if key != "left_out")),
        "",
        *(f"- {note}" for note in document["notes"]),
        *([""] if document["notes"] else []),
        "## Settings",
        "",
        *_table(("setting", "value"), _settings(document)),
        "",
        f"Written by mwtool {document['mwtool_version']}; `macdrop.json` has p of every step and the whole log.",
        "",
    ]
    return _without_folders("\n".join(lines), base, document["model"], document["data"]["name"])


def _loading(base: str) -> list[str]:
    """Code that loads the adapter. PEFT's shortcut needs a base model that others find under the same name."""
    if not _is_local(base):
        return [
            *("```python", "from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer", ""),
            'model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")',
            f'tokenizer = AutoTokenizer.from_pretrained("{base}")',
            "```",
        ]
    return [
        *(
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
        ),
        f'base = "path/to/{Path(base).name}"  # the model it was trained on',
        'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "path/to/this/folder")',
        "tokenizer = AutoTokenizer.from_pretrained(base)",
        "```",
    ]


def _is_local(name: str) -> bool:
    """Whether a model or data set is a file or folder of this machine."""
    return Path(name).expanduser().exists()


def _without_folders(text: str, *names: str) -> str:
    """The text with the names that are paths of this machine, and all absolute paths, cut down to their last part."""
    for name in sorted(filter(_is_local, names), key=len, reverse=True):
        text = text.replace(name, Path(name).name)
    return _FOLDERS.sub("", text)


def _place(one: RankedRows) -> dict[str, Any]:
    """The massive weights as a scan describes them; of rows chosen otherwise, where they are."""
    if isinstance(one, MassiveWeights):
        return one.document()
    return {"layer": one.layer, "module": one.module, "expert": one.expert, "indices": list(one.indices)}


def _macdrop(document: dict[str, Any]) -> list[str]:
    one, curriculum = document["massive"], document["settings"]["curriculum"]
    if one is None:
        return []
    modules = " and ".join(f"`{place['module']}`" for place in document["places"])
    rows = ", ".join(map(str, document["rows"][:8])) + (" ..." if len(document["rows"]) > 8 else "")  # noqa: PLR2004 # enough for a line
    said = (
        f"While it was trained, entries of {len(document['rows'])} rows of {modules} ({rows}) were zero with "
        f"the probability of `{curriculum['schedule']}`; the pre-trained weights themselves are unchanged. Method: "
        f"[House of Cards: Massive Weights in LLMs](https://arxiv.org/abs/2410.01866)."
    )
    return [said, ""]


def _figures(found: dict[str, Any]) -> list[tuple[Any, ...]]:
    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    rows: list[tuple[Any, ...]] = [("training loss", shown(found["first_loss"]), shown(found["last_loss"]))]
    if found["last_eval_loss"] is not None:
        rows.append(("held-out loss", shown(found["first_eval_loss"]), shown(found["last_eval_loss"])))
    return [*rows, ("seconds a step (median)", "", shown(found["step_seconds"]))]


def _settings(document: dict[str, Any]) -> list[tuple[str, Any]]:
    settings = dict(document["settings"])
    curriculum = settings.pop("curriculum")
    modules = settings.pop("target_modules")
    return [
        ("base model", f"{document['model']}" + (f" at {document['revision']}" if document["revision"] else "")),
        *((f"macdrop {key}", value) for key, value in curriculum.items() if key != "phases"),
        *((key, "none" if value is None else value) for key, value in settings.items()),
        ("target_modules", ", ".join(modules) or "all linear layers but embeddings and head"),
        ("steps", document["steps"]),
        ("processes", document["processes"]),
        *((f"version of {key}", value) for key, value in document["versions"].items()),
    ]


def _table(head: Sequence[str], rows: Any) -> list[str]:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *(line(row) for row in rows)]
