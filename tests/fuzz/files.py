"""Mutate the files a model and a result consist of and run commands on them: refused in one line, or right.

    python tests/fuzz/files.py COUNT [SEED [KIND ...]]

COUNT mutations of each kind: safetensors headers, indexes (safetensors and .bin), configurations, tokenizers' files,
adapters' configurations, every kind of document, checkpoints of a run; or only of the kinds that are named. It prints
what came of them and, for every failure, the seed and the number with which it is found again; the exit status is 1 if
there were any. A few hundred take minutes.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
sys.path.insert(0, str(Path(__file__).parent.parent / "files"))

import torch
from command import Ran, run
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_schema import mutated
from transformers import AutoModelForCausalLM
from words import planted_folder

Work = Callable[[Path, random.Random], None]


def prepare(work: Path) -> None:
    """A model in one file, in shards of both formats, an adapter, and a document of each kind."""
    model = planted_folder(work / "single", num_hidden_layers=4)
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    for suffix, index in (("safetensors", "model.safetensors.index.json"), ("bin", "pytorch_model.bin.index.json")):
        folder = work / suffix
        shutil.copytree(model, folder)
        (folder / "model.safetensors").unlink()
        parts = {f"{side}.{suffix}": names[start::2] for start, side in enumerate("ab")}
        for file, held in parts.items():
            part = {name: tensors[name] for name in held}
            save_file(part, folder / file, {"format": "pt"}) if suffix != "bin" else torch.save(part, folder / file)
        files = {name: file for file, held in parts.items() for name in held}
        (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    adapted: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(work / "adapter")
    (work / "t.txt").write_text(" ".join(f"w{n % 40 + 3}" for n in range(200)))
    run("scan", model, "-o", work / "scan.json")
    measured = ("--task", f"ppl:{work / 't.txt'}", "--window", 32)
    run("eval", model, *measured, "-o", work / "eval.json")
    run("ablate", model, *measured, "-k", 1, "--draws", 1, "-o", work / "ablation.json")
    run("quantize-check", model, *measured, "-k", 1, "--bits", 4, "-o", work / "quantization.json")
    (work / "d.jsonl").write_text('{"instruction": "w3", "output": "w4 w5"}\n' * 4)
    run("finetune", model, *training(work), "-o", work / "tuned")


def training(work: Path) -> tuple[object, ...]:
    return "--data", work / "d.jsonl", "--batch-size", 2, "--effective-batch", 2, "--max-steps", 2, "--save-steps", 1


def rewritten(file: str) -> Work:
    """Mutate a JSON file."""

    def act(folder: Path, draw: random.Random) -> None:
        path = folder / file
        path.write_text(json.dumps(mutated(json.loads(path.read_text()), draw)))

    return act


def header(folder: Path, draw: random.Random) -> None:
    """Mutate the header of a safetensors file as JSON, or some of the file's first bytes."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    if draw.random() < 0.5:
        new = json.dumps(mutated(json.loads(content[8 : 8 + size]), draw)).encode("utf-8", "surrogatepass")
        path.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + size :])
        return
    changed = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(min(len(changed), size + 8))] = draw.randrange(256)
    path.write_bytes(bytes(changed[: draw.choice((len(changed), draw.randrange(len(changed)))) or None]))


KINDS: dict[str, tuple[str, Work]] = {
    "safetensors header": ("single", header),
    "index of safetensors": ("safetensors", rewritten("model.safetensors.index.json")),
    "index of .bin": ("bin", rewritten("pytorch_model.bin.index.json")),
    "config.json": ("single", rewritten("config.json")),
    "tokenizer_config.json": ("single", rewritten("tokenizer_config.json")),
    "tokenizer.json": ("single", rewritten("tokenizer.json")),
    "adapter_config.json": ("adapter", rewritten("adapter_config.json")),
    "scan document": (".", rewritten("scan.json")),
    "result file": (".", rewritten("eval.json")),
    "ablation": (".", rewritten("ablation.json")),
    "quantization check": (".", rewritten("quantization.json")),
    "record of a run": (".", rewritten("tuned/macdrop.json")),
    "mark of a checkpoint": (".", rewritten("tuned/checkpoint-2/mwtool_checkpoint.json")),
    "state of a checkpoint": (".", rewritten("tuned/checkpoint-2/trainer_state.json")),
}


def used(kind: str, work: Path, folder: Path) -> list[Ran]:
    """What reads such a file."""
    measured = ("--task", f"ppl:{work / 't.txt'}", "--window", 32)
    model, page = work / "single", work / "page.html"
    resumed = ("finetune", model, *training(work), "-o", work / "tuned", "--resume")
    if kind == "scan document":
        scan = work / "scan.json"
        return [
            run("eval", model, *measured, "--attack", "zero:1", "--massive", scan, "--json"),
            run("ablate", model, *measured, "-k", 1, "--event", "all", "--massive", scan, "--no-controls", "--json"),
            run("export", scan, "--to", "llama.cpp"),
            run("compare", scan, scan),
            run("report", scan, "-o", page),
        ]
    if kind == "result file":
        result = work / "eval.json"
        return [run("eval", "--compare", result, "--json"), run("report", result, "-o", page)]
    if kind == "ablation":
        ablation = work / "ablation.json"
        again = run("ablate", model, *measured, "-k", 1, "--draws", 1, "-o", ablation, "--resume", "--json")
        return [run("report", ablation, "-o", page), again]
    if kind in ("quantization check", "record of a run"):
        path = work / ("quantization.json" if kind.startswith("q") else "tuned/macdrop.json")
        return [run("report", path, "-o", page), *([] if kind.startswith("q") else [run(*resumed)])]
    if kind.endswith("checkpoint"):
        (work / "tuned" / "macdrop.json").unlink()
        return [run(*resumed, "--json")]
    return [run("scan", folder, "--json"), run("eval", folder, *measured, "--json")]


def fault_of(ran: Ran) -> str | None:
    """What is wrong with how a command ended."""
    lines = ran.err.splitlines()
    if ran.code == 0:
        if ran.out.startswith("{"):
            json.loads(ran.out)
        return None
    if ran.code != 1 or ran.out or not lines or not lines[-1].startswith("error: "):
        return f"exit status {ran.code}, {len(lines)} lines on stderr, {len(ran.out)} characters on stdout"
    return None


def main(count: int, seed: int, wanted: list[str]) -> int:
    """Run all kinds; the number of failures."""
    warnings.simplefilter("ignore")
    failures = 0
    with tempfile.TemporaryDirectory() as place:
        intact, first = Path(place) / "intact", Path(place) / "work"
        first.mkdir()
        prepare(first)  # where the copies will be: documents name their model by its path
        first.rename(intact)
        for kind in wanted or KINDS:
            part, act = KINDS[kind]
            ended: Counter[str] = Counter()
            for number in range(count):
                work = Path(shutil.copytree(intact, Path(place) / "work"))
                adapter = work / "adapter" / "adapter_config.json"
                adapter.write_text(
                    json.dumps({**json.loads(adapter.read_text()), "base_model_name_or_path": str(work / "single")})
                )
                try:
                    act(work / part, random.Random(f"{seed} {kind} {number}"))
                    runs = used(kind, work, work / part)
                    said = next(filter(None, map(fault_of, runs)), None)
                    ended["used" if all(ran.code == 0 for ran in runs) else "refused"] += 1
                except BaseException as fault:
                    if isinstance(fault, KeyboardInterrupt):
                        raise
                    last = traceback.extract_tb(fault.__traceback__)[-1]
                    said = f"{type(fault).__name__} {str(fault)[:150]!r} in {last.filename}:{last.lineno}"
                if said:
                    failures += 1
                    print(f"{kind}, seed {seed}, number {number}: {said}", flush=True)
                shutil.rmtree(work)
            print(f"{kind}: {count} tried, {ended['refused']} refused, {ended['used']} used", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(min(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, sys.argv[3:]), 1))
