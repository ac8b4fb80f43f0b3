"""Spellings of options that users bring from transformers, PEFT, TRL and lm-evaluation-harness, and near misses."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from mwtool.errors import nearest

SAME = {
    "--attacks": "--attack",
    "--curriculum": "--macdrop",
    "--dataset": "--data",
    "--dataset-name": "--data",
    "--lora-target-modules": "--target-modules",
    "--max-seq-length": "--max-length",
    "--model-revision": "--revision",
    "--modes": "--mode",
    "--num-epochs": "--num-train-epochs",
    "--output-file": "--output",
    "--output-path": "--output",
    "--per-device-eval-batch-size": "--batch-size",
    "--per-device-train-batch-size": "--batch-size",
    "--tasks": "--task",
    "--text": "--texts",
    "--top-k": "--k",
    "--torch-dtype": "--dtype",
}
"""Spelling of another tool, or of what an option is about: ours."""
LISTS = ("--attacks", "--modes", "--tasks")
"""Spellings whose value is a comma-separated list of what ours is given one by one."""
TOGETHER = {
    "--bf16": ("--dtype", "bfloat16"),
    "--fp16": ("--dtype", "float16"),
    "--load-in-4bit": ("--quantize", "4bit"),
    "--use-dora": ("--peft", "dora"),
}
"""Flag of another tool: our option and its value."""
MODEL = ("--model", "--model-name-or-path", "--pretrained")
"""What other tools call the argument MODEL."""
ADVICE = {
    "--gradient-accumulation-steps": "accumulation follows from --effective-batch and --batch-size",
    "--load-in-8bit": "weights can be quantized to 4 bit: --load-in-4bit",
    "--massive": "ablate, eval and finetune take a saved scan; other commands scan MODEL or take files as arguments",
    "--max-samples": "--limit N measures the first N examples only",
    "--num-fewshot": "tasks run with the number of examples that lm-evaluation-harness defines for them",
    "--resume-from-checkpoint": "--resume continues from the newest complete checkpoint in the output folder",
    "--weight-decay": "AdamW runs with the Trainer's defaults",
}
"""Options of other tools that have no counterpart here: what to do instead."""
SWITCH = {"true": True, "false": False}


def respelled(arguments: Sequence[str], params: Sequence[Any], *, interspersed: bool = True) -> list[str]:
    """The command line in our spelling: hyphens for underscores, our names for those of other tools.

    params: of the command, as Typer holds them. interspersed: whether options may follow arguments; else the first
    argument is a subcommand, and what follows is its own. Values are left as they are, and so is everything after `--`.
    `--packing true` becomes `--packing`, and `--packing false` nothing: that is how HfArgumentParser reads them.
    """
    known, rest, found = _known(params), deque(arguments), list[str]()
    while rest:
        argument = rest.popleft()
        if argument == "--" or not (interspersed or argument.startswith("-")):
            return [*found, argument, *rest]
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            found += _respelled(_hyphenated(name), [value] if equals else None, rest, known)
        else:
            found.append(argument)
            if argument in known and not known[argument].is_flag:
                found += _next(rest)
    return found


def _respelled(name: str, given: list[str] | None, rest: deque[str], known: dict[str, Any]) -> list[str]:
    """One option with its value: the one after `=`, `given`, or the next of `rest`, which is taken from there."""
    if name in known and known[name].is_flag:
        return _flag(name, given, rest, known[name].secondary_opts)
    if name in known:
        return _valued(name, given or _next(rest))
    target = TOGETHER.get(name)
    if target is not None and target[0] in known:
        return [f"{target[0]}={target[1]}"] if _flag(name, given, rest) else []
    if name in MODEL and "model" in known:
        return given or _next(rest)
    if SAME.get(name) not in known:
        return [name] if given is None else [f"{name}={given[0]}"]
    values = given or _next(rest)
    if name in LISTS:
        values = [one.strip() for text in values for one in text.split(",")]
    return _valued(SAME[name], values)


def _flag(name: str, given: list[str] | None, rest: deque[str], opposite: Sequence[str] = ()) -> list[str]:
    """A flag that may be followed by true or false, which HfArgumentParser accepts: the flag, or its opposite."""
    if given is None and rest and rest[0].lower() in SWITCH:
        given = [rest.popleft()]
    if given is None:
        return [name]
    if given[0].lower() not in SWITCH:
        return [f"{name}={given[0]}"]
    return [name] if SWITCH[given[0].lower()] else list(opposite[:1])


def _valued(name: str, values: Sequence[str]) -> list[str]:
    return [f"{name}={one}" for one in values] or [name]


def _next(rest: deque[str]) -> list[str]:
    return [rest.popleft()] if rest else []


def _hyphenated(name: str) -> str:
    return name.replace("_", "-")


def _known(params: Sequence[Any]) -> dict[str, Any]:
    """Options by every spelling of theirs, and the arguments by their names."""
    found = {name: one for one in params if one.param_type_name == "option" for name in one.opts}
    found |= {name: one for one in params if one.param_type_name == "option" for name in one.secondary_opts}
    return found | {one.name: one for one in params if one.param_type_name == "argument"}


def misspelled(arguments: Sequence[str], params: Sequence[Any], *, interspersed: bool = True) -> str | None:
    """What to say of the first option that the command does not have; None where it has them all.

    arguments: as `respelled` gives them, so that the value of a long option stands behind a `=`.
    """
    known, rest = _known(params), deque(arguments)
    while rest:
        argument = rest.popleft()
        if argument == "--" or not (interspersed or argument.startswith("-")):
            return None
        name = argument.partition("=")[0]
        if name.startswith("--") and name not in known:
            return f"there is no option {name}; {_advice(name, known)}"
        if argument in known and not known[argument].is_flag and not argument.startswith("--"):
            _next(rest)
    return None


def _advice(name: str, known: dict[str, Any]) -> str:
    if name in ADVICE:
        return ADVICE[name]
    visible = [one for one in known if one.startswith("--") and not getattr(known[one], "hidden", False)]
    foreign = {one: ours for one, ours in SAME.items() if ours in known}
    foreign |= {one: one for one, (ours, _) in TOGETHER.items() if ours in known}
    candidates = [*visible, *foreign, *(MODEL if "model" in known else ())]
    return nearest(name, candidates, "--help lists those there are", shown=lambda near: foreign.get(near, near))


def named_in_file(key: str, params: Sequence[Any]) -> Any:
    """The parameter that a key of a `--config` file means, in any spelling of the command line, or None."""
    known = _known(params)
    name = _hyphenated(f"--{key}")
    return known.get(name) or known.get(SAME.get(name, name)) or known.get(f"-{key}") or known.get(key)
