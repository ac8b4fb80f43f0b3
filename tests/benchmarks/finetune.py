"""How fast fine-tuning is: mwtool beside TRL's SFTTrainer, interleaved runs of the same model, data and adapter.

    PYTHONPATH=.:adapters python tests/benchmarks/finetune.py [--mode defaults|same] [--shape smollm2,1b,8b]

Models are Llamas of random weights, made on the device. Sequences are random ids; their lengths, and how much of each
is an answer, are those of 999 Alpaca records (`--records alpaca`), or all 2,048 (`--records 2048`). Both sides train
LoRA of rank 16 on all linear layers, in bfloat16 on a GPU, with `--effective` sequences an optimizer step.

--mode defaults  each side as it is by default: ours with what its trial steps find, the rival with 8 sequences at once,
                 padding, checkpointing. The order of the data is the same.
--mode same      both with 8 at once, padding, checkpointing, and the loss computed by the same function.

MacDrop is on, on our side. --rival trl is TRL's SFTTrainer; --rival trainer is transformers' Trainer with the same
settings, for where TRL is not installed. Prints a line a run, and last a table: tokens without padding a second, the
median of the ratios of paired runs with a 95 % interval (order statistics), and the peak of the memory allocated.
The first `--warm` steps of each run are not timed.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

import mwtool.macdrop.engine
from mwtool.finetune.batch_size import fitted
from mwtool.finetune.config import Recipe
from mwtool.finetune.loss import TrainedHead
from mwtool.finetune.report import at_once_line
from mwtool.finetune.sequences import IGNORED, Encoded, collate
from mwtool.finetune.token_trainer import TokenTrainer
from mwtool.finetune.trainer import Telling, adapted, train
from mwtool.massive import MassiveWeights
from mwtool_adapters.llama import LLAMA  # by name: the benchmark runs from the sources alone, uninstalled

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "vocab_size": 1000},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
}
HEADS = {"tiny": (4, 2), "smollm2": (9, 3), "1b": (32, 8), "8b": (32, 8)}
ALPACA = (
    *((52, 7), (56, 15), (61, 3), (64, 10), (66, 18), (69, 14), (73, 31), (78, 11), (82, 7), (87, 35), (95, 45)),
    *((109, 63), (119, 76), (130, 91), (144, 86), (155, 100), (165, 122), (179, 138), (196, 134), (214, 174)),
    *((230, 192), (250, 193), (268, 227), (293, 254), (315, 277), (336, 290), (358, 313), (374, 335), (402, 363)),
    *((423, 381), (456, 417), (542, 494)),
)
"""Tokens of a record and of its answer, in SmolLM2's tokens: 32 records at equal distances in the order of length."""


class InOrder:
    """Sequences are taken in the order of the data, so that both sides take the same at the same step."""

    def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if dataset is None else dataset)  # type: ignore[attr-defined]


TokenTrainer._get_train_sampler = InOrder._get_train_sampler  # type: ignore[assignment]
mwtool.macdrop.engine.adapter_for = lambda _type: LLAMA  # type: ignore[attr-defined, assignment]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=["defaults", "same"], default="defaults")
    parser.add_argument("--rival", choices=["trl", "trainer"], default="trl")
    parser.add_argument("--shape", default="smollm2", help=f"one or several of {', '.join(SHAPES)}")
    parser.add_argument("--records", default="alpaca", help="alpaca, or the tokens of each record")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--effective", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of a run")
    parser.add_argument("--warm", type=int, default=3, help="of these, not timed")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--no-macdrop", action="store_true")
    args = parser.parse_args()
    lines = [measured(shape, args) for shape in args.shape.split(",")]
    place = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    print(
        f"\n{place}; mode {args.mode}, rival {args.rival}, {args.records} records, effective batch {args.effective}, "
    )
    print(f"{args.pairs} pairs of runs of {args.steps} steps; torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}")
    print("shape     ours tok/s  rival tok/s   ratio  95 % of median   ours GiB  rival GiB  ours")
    print("\n".join(lines))


def measured(shape: str, args: argparse.Namespace) -> str:
    """Both sides in turn, the one that goes first alternating; the line of the table."""
    data = sequences(shape, args)
    model = model_of(shape, args)
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "rival": []}
    recipe = recipe_of(args)
    if args.mode == "defaults":
        wrapped = with_adapter(model, recipe)
        recipe = fitted(wrapped, data, recipe)
        model = wrapped.unload()
    print(f"{shape}: ours takes {at_once_line(recipe)}", flush=True)
    for pair in range(args.pairs):
        for side in ("ours", "rival") if pair % 2 else ("rival", "ours"):
            wrapped = with_adapter(model, recipe)
            run = ours if side == "ours" else rival
            clock = Clock(args, sum(len(ids) for ids in data.ids[args.warm * args.effective :]))
            run(wrapped, data, recipe, clock, args)
            found[side].append((clock.speed, clock.peak))
            model = wrapped.unload()
            gc.collect()
            print(f"{shape} pair {pair + 1} {side}: {clock.speed:,.0f} tokens/s, {clock.peak:.2f} GiB", flush=True)
    del model, wrapped
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return row(shape, found, at_once_line(recipe))


def row(shape: str, found: dict[str, list[tuple[float, float]]], what: str) -> str:
    (ours_, rival_), median = (found["ours"], found["rival"]), statistics.median
    ratios = sorted(one[0] / other[0] for one, other in zip(ours_, rival_, strict=True))
    low, high = interval(ratios)
    speeds = f"{median(one[0] for one in ours_):12,.0f} {median(one[0] for one in rival_):12,.0f}"
    peaks = f"{max(one[1] for one in ours_):10.2f} {max(one[1] for one in rival_):10.2f}"
    return f"{shape:<8}{speeds} {median(ratios):7.3f}  {low:.3f} - {high:.3f} {peaks}  {what}"


def interval(ordered: list[float]) -> tuple[float, float]:
    """The narrowest pair of order statistics that holds the median with 95 %; of fewer than 6 the extremes."""
    n = len(ordered)
    for cut in range((n - 1) // 2, -1, -1):
        if 1 - 2 * sum(math.comb(n, i) for i in range(cut + 1)) / 2**n >= 0.95:
            return ordered[cut], ordered[n - 1 - cut]
    return ordered[0], ordered[-1]


class Clock(TrainerCallback):
    """Tokens a second of the steps after the first ones, and the peak of the memory. tokens: of these steps."""

    def __init__(self, args: argparse.Namespace, tokens: int) -> None:
        self.args, self.tokens, self.start, self.speed, self.peak = args, tokens, 0.0, math.nan, math.nan

    def at(self, step: int) -> None:
        """When a step has ended."""
        cuda = self.args.device.startswith("cuda")
        if cuda and step in {self.args.warm, self.args.steps}:
            torch.cuda.synchronize()
        if step == self.args.warm:
            self.start = time.perf_counter()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
        elif step == self.args.steps:
            self.speed = self.tokens / (time.perf_counter() - self.start)
            self.peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else math.nan

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at(state.global_step)


def recipe_of(args: argparse.Namespace) -> Recipe:
    dtype = "bfloat16" if args.device.startswith("cuda") else "float32"
    same: dict[str, Any] = {"batch_size": 8, "gradient_checkpointing": True, "padding_free": False}
    return Recipe(
        effective_batch=args.effective, epochs=1, eval_share=0, dtype=dtype, **(same if args.mode == "same" else {})
    )


def ours(model: Any, data: Encoded, recipe: Recipe, clock: Clock, args: argparse.Namespace) -> None:
    """`train`, as the command calls it."""
    rows = None if args.no_macdrop else massive()
    telling = Telling(logging_steps=10, save_steps=10**6, on_step=lambda at: None if at.logged else clock.at(at.step))
    with tempfile.TemporaryDirectory() as folder:
        trained = train(model, (data, None), rows, recipe, Path(folder), telling=telling)
    if trained.stopped_by is not None:  # `train` lets its step end; a time limit ends the benchmark
        raise SystemExit(128 + trained.stopped_by)


def rival(model: Any, data: Encoded, recipe: Recipe, clock: Clock, args: argparse.Namespace) -> None:
    """The rival's defaults, and what both have in common; in mode `same` our function of the loss."""
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": args.effective // 8,
            "num_train_epochs": 1,
            "learning_rate": recipe.lr,
            "logging_steps": 10,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": recipe.dtype == "bfloat16",
            "use_cpu": args.device == "cpu",
            "dataloader_pin_memory": args.device != "cpu",
        }
        trainer = (sft if args.rival == "trl" else plain)(model, data, common, same=args.mode == "same")
        trainer.add_callback(clock)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


def sft(model: Any, data: Encoded, common: dict[str, Any], *, same: bool) -> Any:
    """TRL's SFTTrainer."""
    import trl
    from datasets import Dataset

    class Rival(InOrder, trl.SFTTrainer):  # type: ignore[misc]
        pass

    class SameLoss(Rival):
        def compute_loss(self, model: Any, inputs: Any, *, num_items_in_batch: Any = None) -> Any:
            labels = inputs.pop("labels")
            with head.at(labels):
                return head.token_mean(model(**inputs), labels, num_items_in_batch)

    head = TrainedHead(model)
    head.narrow_if_same()
    rows = {
        "input_ids": [ids.tolist() for ids in data.ids],
        "labels": [labels.tolist() for labels in data.labels],
    }
    chosen = SameLoss if same else Rival
    return chosen(
        model=model,
        args=trl.SFTConfig(**common, max_length=None),
        train_dataset=Dataset.from_dict(rows),
        processing_class=words(),
    )


def plain(model: Any, data: Encoded, common: dict[str, Any], *, same: bool) -> Any:
    """transformers' Trainer with the settings that TRL's has by default."""

    class Rival(InOrder, transformers.Trainer):
        pass

    class SameLoss(InOrder, TokenTrainer):
        pass

    known = transformers.TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    checkpointing: dict[str, Any] = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    arguments = transformers.TrainingArguments(
        **common, **checkpointing, remove_unused_columns=False, label_names=["labels"]
    )
    if not same:
        return Rival(model=model, args=arguments, train_dataset=data, data_collator=collate)  # type: ignore[arg-type]
    head = TrainedHead(model)
    head.narrow_if_same()
    return SameLoss(model=model, args=arguments, train_dataset=data, head=head)


def words() -> Any:
    """A tokenizer, which TRL wants although all is tokens already."""
    from tokenizers import Tokenizer, models

    raw = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="</s>")


def sequences(shape: str, args: argparse.Namespace) -> Encoded:
    """As many as all steps take, in random order, of random ids."""
    draw, count = torch.Generator().manual_seed(0), args.steps * args.effective
    if args.records == "alpaca":
        lengths = [ALPACA[at] for at in torch.randint(len(ALPACA), (count,), generator=draw).tolist()]
    else:
        lengths = [(int(args.records), int(args.records) - 64)] * count
    size = SHAPES[shape]["vocab_size"]
    ids = [torch.randint(3, size, (total,), generator=draw, dtype=torch.int32) for total, _ in lengths]
    labels = [
        torch.where(torch.arange(total) < total - answer, torch.tensor(IGNORED, dtype=torch.int32), one)
        for one, (total, answer) in zip(ids, lengths, strict=True)
    ]
    return Encoded(ids=tuple(ids), labels=tuple(labels), lengths=tuple((total,) for total, _ in lengths))


def model_of(shape: str, args: argparse.Namespace) -> Any:
    """A Llama of this shape with random weights, on the device and in the precision of training."""
    heads, kv_heads = HEADS[shape]
    config = transformers.LlamaConfig(
        **SHAPES[shape],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=shape == "smollm2",
        attn_implementation="sdpa",
        use_cache=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if args.device.startswith("cuda") else torch.float32)
    try:
        with torch.device(args.device):
            return transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def with_adapter(model: Any, recipe: Recipe) -> Any:
    """The adapter of the command, drawn anew."""
    torch.manual_seed(0)
    source: Any = SimpleNamespace(name="random", reference="random", revision=None)
    return adapted(model, source, recipe)


def massive() -> MassiveWeights:
    """Any rows: what masking costs does not depend on their values."""
    some = (1.0,) * 5
    return MassiveWeights(
        layer=1,
        module="model.layers.1.mlp",
        expert=None,
        indices=(23, 5, 91, 150, 64),
        magnitudes=some,
        shares=some,
        median=0.1,
        count=1,
        share_of_parameters=0.0,
        dimension=0,
        value=1.0,
    )


if __name__ == "__main__":
    main()
