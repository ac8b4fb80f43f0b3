"""Commands killed at moments spread over a run, started again, and compared with the run that was not killed.

    python tests/fuzz/kills.py [finetune|ablate|eval] --count 100

A moment is a number of events: a file of the run opened, renamed or removed, a part of a training step done, a forward
of the model run. They are counted in a run that is not killed; the kills are spread evenly over them. Every second run
is killed once more after it was started again.

finetune, with `--resume`, must end with the adapter and the log of the undisturbed run, bit for bit. eval, with
`--resume`, must end with its figures and samples. ablate, with `--save` and `--resume`, must end with its document and
the saved model, and whenever it is killed the saved model is whole or not there. No document is ever half a file.
Prints what was tried and found; exit status 1 if anything broke these rules.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from torch.nn.modules.module import register_module_forward_hook
from transformers import TrainerCallback
from words import planted_folder

import mwtool.cli
from mwtool.finetune import trainer

OPTIONS = (
    "--rank 4 --lr 1e-2 --max-length 16 --batch-size 2 --effective-batch 4 --dropout 0.1 --device cpu --save-steps 1 "
    "--logging-steps 1 --epochs 2"
).split()
MEASURING = "--window 16 --limit 6".split()
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree")
MOMENTS = (
    "on_train_begin on_step_begin on_substep_end on_pre_optimizer_step on_optimizer_step on_step_end on_log "
    "on_evaluate on_save on_epoch_end on_train_end"
).split()


def child(command: list[str], folder: str, log: Path, count: Callable[[str], None]) -> int:
    """The status of the command in a fork, in which `count` is called at every event of the run's folder."""
    process = os.fork()  # it need not import everything once more
    if process:
        return os.waitpid(process, 0)[1]
    status = 1
    try:
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        listen(folder, count)
        sys.argv = ["mwtool", *command]
        mwtool.cli.main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 # the child must end here, whatever it is
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def listen(folder: str, count: Callable[[str], None]) -> None:
    def heard(event: str, given: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and any(isinstance(one, str) and one.startswith(folder) for one in given):
            count(event)

    sys.addaudithook(heard)
    whole = "ForCausalLM"

    def ran(module: Any, *_: Any) -> None:
        if type(module).__name__.endswith(whole):
            count("forward")

    register_module_forward_hook(ran)
    marks = {name: lambda *_, name=name, **__: count(name) for name in MOMENTS}
    made, callback = trainer._trainer, type("Moments", (TrainerCallback,), marks)

    def with_moments(*args: Any, **options: Any) -> Any:
        found = made(*args, **options)
        found.add_callback(callback())
        return found

    trainer._trainer = with_moments


@dataclass(frozen=True)
class Job:
    """A command that is killed.

    arguments: without where it writes; writes: that, in a folder. outcome: what is left there; ended: whether the
    command cannot be started again since all is there.
    """

    arguments: list[str]
    writes: Callable[[Path], list[str]]
    outcome: Callable[[Path], Any]
    ended: Callable[[Path], bool] = lambda _: False


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def trained(folder: Path) -> Any:
    record = json.loads((folder / "macdrop.json").read_text())
    return digest(folder / "adapter_model.safetensors"), record["log"], record["p"]


def measured(folder: Path) -> Any:
    document = json.loads((folder / "eval.json").read_text())
    assert document["complete"]
    return [{key: value for key, value in one.items() if key != "seconds"} for one in document["results"]]


def saved(folder: Path) -> Any:
    return {path.name: digest(path) for path in sorted((folder / "saved").iterdir())}


def jobs(model: Path) -> dict[str, Job]:
    """The commands that are killed, on a tiny model."""
    task = ["--task", f"ppl:{model / 'text.txt'}", *MEASURING]
    return {
        "finetune": Job(
            ["finetune", str(model), "--data", str(model / "text.txt"), *OPTIONS, "--resume"],
            lambda folder: ["-o", str(folder)],
            trained,
        ),
        "ablate": Job(
            ["ablate", str(model), *task, "--mode", "zero", "-k", "2", "--draws", "2", "--resume"],
            lambda folder: ["-o", str(folder / "ablation.json"), "--save", str(folder / "saved")],
            saved,
            lambda folder: (folder / "saved").exists(),
        ),
        "eval": Job(
            [
                *("eval", str(model), *task, "--task", f"cloze:{model / 'cloze.jsonl'}", "--attack", "none"),
                *("--attack", "zero:1", "--attack", "retain:2", "--batch-size", "1", "--resume"),
            ],
            lambda folder: ["-o", str(folder / "eval.json")],
            measured,
        ),
    }


def killer(at: int) -> Callable[[str], None]:
    left = [at]

    def count(event: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.write(2, f"killed at {event}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    return count


def half_written(folder: Path) -> str | None:
    """A document in the folder that is no JSON."""
    for path in folder.glob("*.json"):
        try:
            json.loads(path.read_text())
        except ValueError as fault:
            return f"{path.name} is half a file: {fault}"
    return None


def attempt(job: Job, out: Path, at: int, again: int | None, expected: Any) -> str:
    """What came of a run killed at the given events, in a word or a complaint."""
    command, log = [*job.arguments, *job.writes(out)], out.with_suffix(".log")
    for moment in (at, again):
        if moment is None or job.ended(out):
            continue
        status = child(command, str(out), log, killer(moment))
        if os.WIFEXITED(status) and (moment == at or status):  # the second kill may come too late: nothing is left
            return f"not killed at event {moment}, status {status}: {log.read_text()[-600:]}"
        if (said := half_written(out)) is not None:
            return said
    if not job.ended(out):
        status = child(command, str(out), log, lambda _: None)
        if status != 0:
            return f"status {status}: {log.read_text()[-600:]}"
    return "equal" if job.outcome(out) == expected else "another outcome"


def killed(name: str, job: Job, place: Path, count: int, rng: random.Random) -> int:
    """Kill one command at `count` moments; how many of them broke a rule."""
    events, whole = place / f"{name}.events", place / f"{name}-whole"
    events.touch()
    handle = os.open(events, os.O_WRONLY | os.O_APPEND)
    if name != "finetune":
        whole.mkdir()

    def write(event: str) -> None:
        os.write(handle, f"{event}\n".encode())

    if child([*job.arguments, *job.writes(whole)], str(whole), whole.with_suffix(".log"), write):
        print(whole.with_suffix(".log").read_text())
        return 1
    names, expected = events.read_text().split(), job.outcome(whole)
    found: Counter[str] = Counter()
    for number in range(count):
        at = 1 + (2 * number + 1) * len(names) // (2 * count)
        again = rng.randrange(1, len(names)) if number % 2 else None
        out = place / f"{name}{number}"
        if name != "finetune":
            out.mkdir()
        said = attempt(job, out, at, again, expected)
        found[said if said == "equal" else "BROKEN"] += 1
        if said != "equal":
            print(f"--- {name} killed at event {at} ({names[at - 1]}), then at {again}: {said}", flush=True)
        shutil.rmtree(out, ignore_errors=True)
    outcomes = ", ".join(f"{number:,} {what}" for what, number in found.most_common())
    print(f"{name}: {count:,} runs killed at one of {len(names):,} events: {outcomes}", flush=True)
    return found["BROKEN"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", help="which of them to kill; all if none is named")
    parser.add_argument("--count", type=int, default=100, help="runs of each to kill")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        model = planted_folder(place / "model", num_hidden_layers=4)
        (model / "cloze.jsonl").write_text('{"context": "w3 w4", "continuation": "w5"}\n' * 4)
        broken = [
            killed(name, job, place, args.count, random.Random(args.seed))
            for name, job in jobs(model).items()
            if name in (args.commands or jobs(model))
        ]
    return min(sum(broken), 1)


if __name__ == "__main__":
    sys.exit(main())
