"""`mwtool finetune` killed at moments spread over a run, resumed, and compared with the run that was not killed.

    python tests/fuzz/kills.py --count 100

A moment is a number of events: a file of the run opened, renamed or removed, or a part of a step done. They are
counted in a run that is not killed; the kills are spread evenly over them. Every second run is killed once more after
it was resumed. Each must end with the adapter and the log of the undisturbed run, bit for bit. Prints what was tried
and found; exit status 1 if anything broke this rule.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from transformers import TrainerCallback
from words import planted_folder

import mwtool.cli
from mwtool.finetune import trainer

OPTIONS = (
    "--rank 4 --lr 1e-2 --max-length 16 --batch-size 2 --effective-batch 4 --dropout 0.1 --device cpu --save-steps 1 "
    "--logging-steps 1 --epochs 2"
).split()
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree")
MOMENTS = (
    "on_train_begin on_step_begin on_substep_end on_pre_optimizer_step on_optimizer_step on_step_end on_log "
    "on_evaluate on_save on_epoch_end on_train_end"
).split()


def child(command: list[str], log: Path, count: Callable[[str], None]) -> int:
    """The status of the command in a fork, in which `count` is called at every event of the run's folder."""
    process = os.fork()  # it need not import everything once more
    if process:
        return os.waitpid(process, 0)[1]
    status = 1
    try:
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        listen(command[command.index("-o") + 1], count)
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
    marks = {name: lambda *_, name=name, **__: count(name) for name in MOMENTS}
    made, callback = trainer._trainer, type("Moments", (TrainerCallback,), marks)

    def with_moments(*args: Any) -> Any:
        found = made(*args)
        found.add_callback(callback())
        return found

    trainer._trainer = with_moments


def outcome(folder: Path) -> tuple[str, Any, Any]:
    record = json.loads((folder / "macdrop.json").read_text())
    return sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest(), record["log"], record["p"]


def killer(at: int) -> Callable[[str], None]:
    left = [at]

    def count(event: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.write(2, f"killed at {event}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    return count


def attempt(command: list[str], out: Path, at: int, again: int | None, expected: Any) -> str:
    """What came of a run killed at the given events, in a word or a complaint."""
    command, log = [*command, "-o", str(out), "--resume"], out.with_suffix(".log")
    for moment in (at, again):
        if moment is None:
            continue
        status = child(command, log, killer(moment))
        if os.WIFEXITED(status) and (moment == at or status):  # the second kill may come too late: nothing is left
            return f"not killed at event {moment}, status {status}: {log.read_text()[-600:]}"
    status = child(command, log, lambda _: None)
    if status != 0:
        return f"status {status}: {log.read_text()[-600:]}"
    return "equal" if outcome(out) == expected else "another adapter or log"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="runs to kill")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        model = planted_folder(place / "model")
        command = ["finetune", str(model), "--data", str(model / "text.txt"), *OPTIONS]
        events = place / "events"
        events.touch()
        handle = os.open(events, os.O_WRONLY | os.O_APPEND)

        def write(event: str) -> None:
            os.write(handle, f"{event}\n".encode())

        status = child([*command, "-o", str(place / "whole")], place / "whole.log", write)
        if status:
            print((place / "whole.log").read_text())
            return 1
        names = events.read_text().split()
        expected = outcome(place / "whole")
        for number in range(args.count):
            at = 1 + (2 * number + 1) * len(names) // (2 * args.count)
            again = rng.randrange(1, len(names)) if number % 2 else None
            said = attempt(command, place / f"run{number}", at, again, expected)
            found[said if said == "equal" else "BROKEN"] += 1
            if said != "equal":
                print(f"--- killed at event {at} ({names[at - 1]}), then at {again}: {said}")
    outcomes = ", ".join(f"{number:,} {name}" for name, number in found.most_common())
    print(f"{args.count:,} runs killed at one of {len(names):,} events: {outcomes}")
    return 1 if found["BROKEN"] else 0


if __name__ == "__main__":
    sys.exit(main())
