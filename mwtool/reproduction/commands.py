"""The command lines that repeat each step of a study, as they are recorded in documents and shown in the page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mwtool.reproduction.config import KS, MASSIVE, StudyConfig
from mwtool.reproduction.runs import Evaluation, Kind, Run

SCAN = "scan.json"
"""Name of the document of the scan."""
SWEEPS: dict[Kind, str] = {"texts": "ablation.json", "tasks": "ablation.tasks.json"}
"""Names of the documents of the attacks beside controls."""


def scan_command(config: StudyConfig) -> str:
    """The scan, with a check on the first text."""
    texts = list(config.measuring.texts.values())
    checked = ["--check", texts[0]] if texts else []
    return _line("scan", config.model, "-k", max(KS), *checked, *_opening(config), "-o", config.folder / SCAN)


def sweep_ks(kind: Kind) -> tuple[int, ...]:
    """k of the attacks beside controls; on tasks, which take longer, that of Table 1 alone."""
    return (0, *KS) if kind == "texts" else (MASSIVE,)


def sweep_command(config: StudyConfig, kind: Kind) -> str:
    """The attacks on texts or tasks beside their controls."""
    return _line(
        *("ablate", config.model, "-k", ",".join(map(str, sweep_ks(kind)))),
        *("--massive", config.folder / SCAN, "--draws", config.measuring.draws),
        *_tasks(config, kind),
        *_limits(config, kind),
        *_opening(config),
        *("-o", config.folder / SWEEPS[kind]),
    )


def train_command(config: StudyConfig, run: Run) -> str:
    """One fine-tuning run."""
    training, batch = config.training, run.batch_size or config.training.batch_size
    optional: list[Any] = ["--massive", config.folder / SCAN] if run.schedule != "none" else []
    optional += ["--scope", run.scope] if run.scope != "massive" else []
    optional += ["--resample", run.resample] if run.resample != "step" else []
    optional += ["--max-steps", training.max_steps] if training.max_steps else []
    optional += ["--max-length", training.max_length] if training.max_length else []
    return _line(
        *("finetune", config.model, "--data", training.data, "--macdrop", run.schedule, "-k", run.k),
        *("--peft", run.peft, "--lora-r", training.rank, "--lora-alpha", training.alpha),
        *("--lr", run.lr, "--epochs", training.epochs),
        *("--batch-size", batch, "--effective-batch", training.effective_batch),
        *("--no-gradient-checkpointing", "--seed", run.seed),
        *optional,
        *_opening(config, dtype=config.train_dtype),
        *("-o", config.folder / run.name),
    )


def evaluate_command(config: StudyConfig, run: Run | None, one: Evaluation) -> str:
    """One evaluation, of a run's adapter or of the model itself."""
    return _line(
        *("eval", model_of(config, run), *(("--on", one.on) if run is not None else ())),
        *_tasks(config, one.kind),
        *(part for attack in one.attacks for part in ("--attack", attack)),
        *(("--massive", config.folder / SCAN) if one.attacks != ("none",) else ()),
        *_limits(config, one.kind),
        *_opening(config, of_adapter=run is not None),
        *("-o", folder_of(config, run) / one.file),
    )


def folder_of(config: StudyConfig, run: Run | None) -> Path:
    """Where the evaluations of a run lie; None: those of the model itself."""
    return config.folder if run is None else config.folder / run.name


def model_of(config: StudyConfig, run: Run | None) -> str:
    """What is evaluated: the model, or the folder of a run's adapter."""
    return config.model if run is None else str(config.folder / run.name)


def tasks_of(config: StudyConfig, kind: str) -> tuple[str, ...]:
    """The tasks of an evaluation, as the command line spells them."""
    if kind == "tasks":
        return config.measuring.tasks
    return tuple(f"ppl:{target}" for target in config.measuring.texts.values())


def _tasks(config: StudyConfig, kind: str) -> list[str]:
    return [part for task in tasks_of(config, kind) for part in ("--task", task)]


def _limits(config: StudyConfig, kind: str) -> list[Any]:
    measuring = config.measuring
    limit = measuring.windows if kind == "texts" else measuring.limit
    found: list[Any] = [] if limit is None else ["--limit", limit]
    found += ["--window", measuring.window] if measuring.window and kind == "texts" else []
    return found + (["--batch-size", measuring.batch_size] if measuring.batch_size else [])


def _opening(config: StudyConfig, *, dtype: str | None = None, of_adapter: bool = False) -> list[Any]:
    """Options with which the model is opened, where they are not the default."""
    loading = config.loading
    found: list[Any] = []
    if not of_adapter:
        found += ["--revision", loading.revision] if loading.revision else []
        found += ["--gguf-file", loading.gguf_file] if loading.gguf_file else []
    chosen = dtype or loading.dtype
    found += ["--dtype", chosen] if chosen != "auto" else []
    found += ["--device", loading.device.partition(":")[0]] if loading.device != "cpu" else []
    return found + (["--trust-remote-code"] if loading.trust_remote_code else [])


def _line(*parts: Any) -> str:
    return shlex.join(["mwtool", *map(str, parts)])


def all_of(config: StudyConfig, run: Run, evaluations: Sequence[Evaluation]) -> list[str]:
    """The commands of a run and of its evaluations."""
    return [train_command(config, run), *(evaluate_command(config, run, one) for one in evaluations)]
