"""Does MacDrop make a fine-tuned model lean less on its massive weights? Runs, measures, and prints the table.

    python tests/benchmarks/robustness.py --data FILE --out DIR [--seeds 5] [--steps 150] [--jobs 1] [--device cpu]

LoRA and DoRA, each without MacDrop, with step:0.8 and with exp:0.8,alpha=0.01, at every seed, through the functions
that `mwtool finetune` calls. The held-out part of the data is the same for all seeds; adapter, order and masks are
not. Measured are the held-out loss, and the perplexity of the bundled text with the 1, 3 and 5 first massive rows of
the base model zeroed, over that of the same fine-tuned model as it is: taken out of the pre-trained weights under
the adapter (`base`), and out of the sum of both (`merged`).

Prints means over seeds with 95 % intervals (Student's t) as a Markdown table, of ratios their geometric means; and
each curriculum's ratio over that without MacDrop, paired by seeds. DIR/robustness.json has every run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from mwtool.ablation.sweep import Sweep, ablate
from mwtool.cli.terminal import quiet_libraries
from mwtool.evaluation.comparison import ratio_of, student_t
from mwtool.evaluation.config import Options
from mwtool.evaluation.tasks import parse_tasks
from mwtool.files.atomic_write import write
from mwtool.files.document import text_of
from mwtool.finetune.config import Asked, Recipe
from mwtool.finetune.document import measured
from mwtool.finetune.plan import Plan, make_plan
from mwtool.finetune.trainer import train, with_adapter
from mwtool.macdrop.curriculum import curriculum_of
from mwtool.models.load import load
from mwtool.models.locate import locate
from mwtool.scan.document import scan_document
from mwtool.scan.scanner import scan_checkpoint
from mwtool.scan.settings import Choice, Settings
from mwtool.scan.targets import find_targets
from mwtool.surgery.attack import Attack

PEFTS = ("lora", "dora")
SCHEDULES = ("none", "step:0.8", "exp:0.8,alpha=0.01")
KS = (1, 3, 5)
WAYS = ("base", "merged")


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    scan = args.out / "massive.json"
    if args.one is None:
        write(scan, text_of(scan_document(scan_checkpoint(args.model, Settings(k=max(KS))))))
        everything(args)
    else:
        peft, schedule, seed = args.one.split("|")
        write(args.out / f"{name(peft, schedule, int(seed))}.json", text_of(run(args, scan, peft, schedule, int(seed))))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="training data, as mwtool finetune takes it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=int, help="only so many windows of the bundled text")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each a process of its own")
    parser.add_argument("--keep", action="store_true", help="keep the adapters")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def name(peft: str, schedule: str, seed: int) -> str:
    return f"{peft}-{schedule.partition(':')[0]}-{seed}"


def everything(args: argparse.Namespace) -> None:
    """All runs that are not there yet, so many at once, and the table."""
    combinations = [(peft, schedule, seed) for seed in range(args.seeds) for peft in PEFTS for schedule in SCHEDULES]
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    started = time.perf_counter()

    def one(combination: tuple[str, str, int]) -> None:
        if (args.out / f"{name(*combination)}.json").exists():
            return
        command = [sys.executable, *sys.argv, "--one", "|".join(map(str, combination))]
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        print(f"{name(*combination)} done after {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, combinations))
    runs = [json.loads((args.out / f"{name(*one)}.json").read_text(encoding="utf-8")) for one in combinations]
    reference = untrained(args)
    said = {
        "command": " ".join(["python", *sys.argv]),
        "settings": {key: value for key, value in vars(args).items() if key not in ("one", "out")},
        "untrained": reference,
        "runs": runs,
    }
    write(args.out / "robustness.json", json.dumps(said, indent=2) + "\n")
    print("\n".join(table(runs, reference)))


def run(args: argparse.Namespace, scan: Path, peft: str, schedule: str, seed: int) -> dict[str, Any]:
    """One fine-tuning and what is measured on it."""
    recipe = Recipe(
        curriculum=curriculum_of(schedule, seed=seed, k=max(KS)),
        peft=peft,  # type: ignore[arg-type] # one of the two
        rank=args.rank,
        alpha=args.rank,
        lr=args.lr,
        max_steps=args.steps,
        batch_size=args.batch,
        effective_batch=args.batch,
        dtype=args.dtype,
    )
    plan: Plan = make_plan(locate(args.model), recipe, Asked(data=args.data, massive=scan))
    recipe = replace(plan.recipe, seed=seed)  # the held-out part was drawn before, with the same seed for all
    folder = args.out / name(peft, schedule, seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    model = with_adapter(plan.source, recipe, args.device)
    trained = train(model, (plan.train, plan.held), plan.places, recipe, folder)
    figures = measured(list(trained.log), trained)
    ratios = {way: zeroed(args, str(folder), scan, way) for way in WAYS}
    if not args.keep:
        shutil.rmtree(folder)
    return {"peft": peft, "schedule": schedule, "seed": seed, **figures, "zeroed": ratios, "p": trained.history}


def untrained(args: argparse.Namespace) -> dict[str, Any]:
    """The same ratios of the model as it was."""
    return zeroed(args, args.model, args.out / "massive.json", "base")


def zeroed(args: argparse.Namespace, model: str, scan: Path, way: str) -> dict[str, Any]:
    """Perplexity as it is, and its ratio with the first k rows zeroed."""
    loaded = load(model, on=way, dtype="float32", device=args.device)  # type: ignore[arg-type] # one of the two
    targets, _ = find_targets(loaded, Choice(file=scan), max(KS))
    sweep = Sweep((Attack("zero"),), KS, draws=0)
    found = ablate(loaded, targets, parse_tasks(["ppl:demo"]), sweep, Options(limit=args.limit))
    ratios = [ratio_of(one.measured[0], found.baseline[0]) for one in found.runs]
    values = [None if one is None else one.value for one in ratios]
    return {"perplexity": found.baseline[0].value, "ratio": dict(zip(map(str, KS), values, strict=True))}


def table(runs: Sequence[dict[str, Any]], reference: dict[str, Any]) -> Iterator[str]:
    """Markdown: a line a way of training, then a line a comparison with training without MacDrop."""
    heads = [f"{way}, zero {k}" for way in WAYS for k in KS]
    yield f"| adapter | MacDrop | held-out loss | ppl:demo | {' | '.join(heads)} |"
    yield "|" + "---|" * (4 + len(heads))
    first = f"{statistics.fmean(run['first_eval_loss'] for run in runs):.3f}"
    plain = [f"x{reference['ratio'][str(k)]:.3f}" for k in KS]
    yield f"| none | - | {first} | {reference['perplexity']:.2f} | {' | '.join(plain + plain)} |"
    for peft in PEFTS:
        for schedule in SCHEDULES:
            chosen = picked(runs, peft, schedule)
            loss = spread([run["last_eval_loss"] for run in chosen], ".3f")
            perplexity = spread([run["zeroed"]["base"]["perplexity"] for run in chosen], ".2f")
            cells = [ratio_spread(ratios(chosen, way, k)) for way in WAYS for k in KS]
            yield f"| {peft} | {schedule} | {loss} | {perplexity} | {' | '.join(cells)} |"
    yield ""
    yield f"| adapter | over none | held-out loss | {' | '.join(heads)} |"
    yield "|" + "---|" * (3 + len(heads))
    for peft in PEFTS:
        for schedule in SCHEDULES[1:]:
            ours, plainly = picked(runs, peft, schedule), picked(runs, peft, "none")
            pairs = list(zip(ours, plainly, strict=True))
            loss = spread([one["last_eval_loss"] - other["last_eval_loss"] for one, other in pairs], "+.4f")
            cells = []
            for way in WAYS:
                for k in KS:
                    both = zip(ratios(ours, way, k), ratios(plainly, way, k), strict=True)
                    cells.append(ratio_spread([one / other for one, other in both]))
            yield f"| {peft} | {schedule} | {loss} | {' | '.join(cells)} |"


def picked(runs: Sequence[dict[str, Any]], peft: str, schedule: str) -> list[dict[str, Any]]:
    return [run for run in runs if (run["peft"], run["schedule"]) == (peft, schedule)]


def ratios(runs: Sequence[dict[str, Any]], way: str, k: int) -> list[float]:
    values = [run["zeroed"][way]["ratio"][str(k)] for run in runs]
    return [math.inf if value is None else value for value in values]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval; nan for fewer than four values."""
    mean = statistics.fmean(values)
    if len(values) < 4:
        return mean, math.nan
    return mean, student_t(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def spread(values: Sequence[float], form: str) -> str:
    mean, half = interval(values)
    return format(mean, form) + ("" if math.isnan(half) else f" ± {format(half, form.lstrip('+'))}")


def ratio_spread(values: Sequence[float]) -> str:
    """Geometric mean and interval of ratios."""
    if not all(map(math.isfinite, values)):
        return "not finite"
    mean, half = interval([math.log(value) for value in values])
    if math.isnan(half):
        return f"x{math.exp(mean):.3f}"
    return f"x{math.exp(mean):.3f} [{math.exp(mean - half):.3f}, {math.exp(mean + half):.3f}]"


if __name__ == "__main__":
    main()
