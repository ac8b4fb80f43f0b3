"""Train the bundled model: a small Llama whose massive weights grow by themselves.

    python -m mwtool.demo.train --corpus books.txt.xz --output runs/seed-2 --seed 2

Nothing is planted. A high learning rate, weight decay and a bos token at the first
position of every sequence are enough for one early feed-forward layer to grow a row
that drives the whole residual stream of bos; the seed decides in which layer. More
weight decay leaves less that could stand in for that row (see the model card).

The corpus is one UTF-8 text file, plain or ``.xz``. The tokenizer is trained on it
first (byte-level BPE) unless `--cache` has one; `--prepare` stops after that, so that
several runs can share a cache. `python -m mwtool.demo.choose` compares finished runs.
Runs on one GPU or on a CPU. On a GPU a run repeats only up to
floating-point noise, which training amplifies: the model card therefore gives the
figures of the weights shipped, not of the recipe.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4096
SPECIAL = ("<unk>", "<s>", "</s>")
BOS = SPECIAL.index("<s>")


def main() -> None:
    args = arguments()
    tokens = prepare(args.corpus, args.cache)
    if args.prepare:
        return
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(configuration(args)).to(args.device)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.cache, model_max_length=args.context)
    log = train(model, torch.from_numpy(tokens.astype(np.int32)), args, tokenizer)
    args.output.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    record = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "tokens_in_corpus": len(tokens),
        "parameters": model.num_parameters(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu",
        **log,
    }
    (args.output / "train.json").write_text(json.dumps(record, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True, help="training text, UTF-8, plain or .xz")
    parser.add_argument("--output", type=Path, default=Path("demo-run"), help="folder for the trained model")
    parser.add_argument(
        "--cache", type=Path, default=Path("demo-cache"), help="tokenizer and tokenised corpus, shared by runs"
    )
    parser.add_argument("--prepare", action="store_true", help="fill the cache and stop")
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--intermediate-size", type=int, default=512)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--context", type=int, default=256, help="tokens a sequence, bos included")
    parser.add_argument("--batch-size", type=int, default=192, help="sequences a step")
    parser.add_argument("--tokens", type=float, default=305e6, help="training tokens in all")
    parser.add_argument(
        "--minutes", type=float, help="train fewer tokens if this is reached first, as the first steps foretell"
    )
    parser.add_argument("--learning-rate", type=float, default=1.2e-2)
    parser.add_argument("--warmup", type=int, default=300, help="steps")
    parser.add_argument("--weight-decay", type=float, default=0.3, help="on matrices")
    parser.add_argument(
        "--save-steps", type=int, help="keep a checkpoint-N in the output folder every N steps, for `mwtool track`"
    )
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def prepare(corpus: Path, cache: Path) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    """Tokenizer and token ids of the corpus, from the cache where it has them. Shape (N,)."""
    ids = cache / "tokens.npy"
    if not ids.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with (lzma.open if corpus.suffix == ".xz" else open)(corpus, "rt", encoding="utf-8") as file:
            lines = file.read().splitlines(keepends=True)
        if not (cache / "tokenizer.json").exists():
            PreTrainedTokenizerFast(
                tokenizer_object=train_tokenizer(lines), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
            ).save_pretrained(cache)
        tokenizer = tokenizers.Tokenizer.from_file(str(cache / "tokenizer.json"))
        np.save(ids, np.fromiter(encode(tokenizer, lines), dtype=np.uint16))
    tokens: np.ndarray[tuple[int], np.dtype[np.uint16]] = np.load(ids, mmap_mode="r")
    return tokens


def train_tokenizer(lines: list[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE of 4,096 tokens that puts <s> in front of a text, as Llama's does."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, lines: list[str], chunk: int = 20_000) -> Iterator[int]:
    for start in range(0, len(lines), chunk):
        for encoding in tokenizer.encode_batch_fast(lines[start : start + chunk], add_special_tokens=False):
            yield from encoding.ids


def configuration(args: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=args.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=SPECIAL.index("</s>"),
    )


def train(
    model: LlamaForCausalLM, tokens: Tensor, args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast
) -> dict[str, object]:
    """AdamW under bf16 autocast; each sequence is bos and `context - 1` tokens from a random place."""
    length = Length(max(1, round(args.tokens / (args.batch_size * args.context))), args.minutes)
    optimizer = torch.optim.AdamW(groups(model, args.weight_decay), lr=args.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, length.steps, args.warmup))
    sample = torch.Generator(device=args.device).manual_seed(args.seed)
    tokens, offsets = tokens.to(args.device), torch.arange(args.context - 1, device=args.device)
    forward = torch.compile(model) if args.device.startswith("cuda") else model
    losses: list[list[float]] = []
    model.train()
    for step in count():
        if args.save_steps and step % args.save_steps == 0:
            for one in (model, tokenizer):
                one.save_pretrained(args.output / f"checkpoint-{step}")
        if step == length.fit(step):
            break
        first = torch.randint(len(tokens) - args.context, (args.batch_size, 1), generator=sample, device=args.device)
        batch = tokens[first + offsets].long()  # [B, context - 1]
        batch = torch.nn.functional.pad(batch, (1, 0), value=BOS)  # [B, context]
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            loss = forward(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == length.steps - 1:
            losses.append([step, round(loss.item(), 4)])
            seconds = time.monotonic() - length.start
            print(f"{args.output.name} step {step}/{length.steps} loss {losses[-1][1]} {seconds:.0f} s", flush=True)
            if not math.isfinite(losses[-1][1]):
                raise SystemExit(
                    f"{args.output.name}: the loss is {losses[-1][1]} at step {step}; lower --learning-rate"
                )
    return {"steps": length.steps, "seconds": round(time.monotonic() - length.start), "losses": losses}


class Length:
    """How many steps there are: as many as were asked for, or as fit into the time.

    The learning rate is constant in the first 70 % of a run, so that changing its end before that bends nothing.
    """

    def __init__(self, steps: int, minutes: float | None) -> None:
        self.most, self.steps, self.minutes = steps, steps, minutes
        self.start, self.counted = time.monotonic(), 0.0

    def fit(self, step: int) -> int:
        """Foretell the end from the steps behind the first hundred, whose time is compilation."""
        now = time.monotonic()
        if step == 100:
            self.counted = now
        if self.minutes is not None and step > 100 and step % 200 == 0 and step < 0.6 * self.steps:
            pace, left = (now - self.counted) / (step - 100), 60 * self.minutes - (now - self.start)
            self.steps = min(self.most, max(step + 1, step + round(left / pace)))
        return self.steps


def groups(model: LlamaForCausalLM, weight_decay: float) -> list[dict[str, object]]:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def rate(step: int, steps: int, warmup: int, constant: float = 0.7, final: float = 0.03) -> float:
    """Linear warm-up, constant until 70 % of the run, then linear down to 3 % of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    left = (steps - step) / max(1.0, steps * (1 - constant))
    return final + (1 - final) * min(1.0, left)


if __name__ == "__main__":
    main()
