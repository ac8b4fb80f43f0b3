"""Random records and chat templates, read and encoded: each gives sequences, or a failure in one line.

    python tests/fuzz/records_and_templates.py --count 2000 --seed 0

Every record must be counted once: trained on, left out with a reason, or unreadable. Every sequence must be the tokens
of the text that the template wrote. Prints what was tried and found; exit status 1 if anything broke these rules.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from mwtool.errors import MwtoolError
from mwtool.finetune.data import read_data
from mwtool.finetune.sequences import IGNORED
from mwtool.finetune.tokenize import encode
from mwtool.models.source import DEMO

TEXTS = ["", " ", "Yes", "Is it?", "a\nb", "😀", "</s>", "<think>x</think>y", "{{ 1 }}", "'\"\\", "\u2028", "x" * 300]
ROLES = ["user", "assistant", "system", "developer", "tool", "User", "gpt", "human", "judge", None, 3]
KEYS = "instruction output input messages conversations text system history tools weight id".split()
HEADS = ["", " ", "\\n", "A: ", "<think>", "{{ bos_token }}", "[{{ m.role }}]"]
CONTENTS = [
    "{{ m.content }}", "{{ m['content'] | trim }}", "{{ m.content.upper() }}", "{{ m.content[0].text }}", "", "{{ m }}",
    "{% for c in m.content %}{{ c.text }}{% endfor %}", "{{ m.content + 1 }}", "{{ m.content.split('</think>')[-1] }}",
]  # fmt: skip
EXTRA = [
    "", "", "", "{{ raise_exception('no') }}", "{{ 'x' * 10**10 }}", "{{ 1 // 0 }}", "{% if %}",
    "{{ strftime_now('%d') }}",
    "{% if loop.last %}<t></t>{% endif %}", "{{ tools | tojson }}", "{{ undefined.x }}", "{{ range(10**9) | list }}",
]  # fmt: skip


def content(rng: random.Random) -> Any:
    text = rng.choice(TEXTS[2:] if rng.random() < 0.97 else TEXTS)
    if rng.random() < 0.85:
        return text
    parts = [{"type": "text", "text": text}]
    return parts if rng.random() < 0.8 else rng.choice([[{"type": "image", "text": None}], None, 7, [text]])


def value(rng: random.Random, key: str) -> Any:
    if key in ("messages", "conversations") and rng.random() < 0.9:
        names = [("role", "content"), ("role", "content"), ("from", "value")]
        keys = rng.choice(names)
        if rng.random() < 0.6:  # a conversation as it should be: users and assistants in turn, the answer last or not
            turns = ["user", "assistant"] * rng.randrange(1, 4) + ["user"] * rng.randrange(2)
            return [{keys[0]: turn, keys[1]: content(rng)} for turn in turns]
        return [message(rng, *keys) for _ in range(rng.randrange(5))] + (
            [{"role": "assistant", "content": "Yes"}] if rng.random() < 0.7 else []
        )
    if key == "history" and rng.random() < 0.7:
        return [[rng.choice(TEXTS), rng.choice(TEXTS)] for _ in range(rng.randrange(3))]
    if key == "tools":
        return rng.choice([[], "[]", [{"name": "f"}], '[{"name": "f"}]', "x", 3])
    return content(rng)


def message(rng: random.Random, role: str, text: str) -> Any:
    made: dict[str, Any] = {role: rng.choice(ROLES[:5] if rng.random() < 0.95 else ROLES), text: content(rng)}
    if rng.random() < 0.2:
        made["weight"] = rng.choice([0, 1, None, 0.5])
    if rng.random() < 0.1:
        made["tool_calls"] = rng.choice([[], None, [{"function": {"name": "f", "arguments": "{}"}}], [3]])
    return made if rng.random() < 0.97 else rng.choice(TEXTS)


FORMS = [["instruction", "output"], ["messages"], ["messages"], ["conversations"], ["text"]]


def line(rng: random.Random, form: list[str]) -> bytes:
    more = rng.sample(KEYS, rng.randrange(3)) if rng.random() < 0.3 else []
    made = {key: value(rng, key) for key in sorted({*form, *more})}  # sorted: the order of a set differs between runs
    text = json.dumps(made, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    roll = rng.random()
    if roll < 0.05:
        return text.replace(b"Yes", b"\\ud83d")
    if roll < 0.1:
        place = rng.randrange(len(text) + 1)
        return text[:place] + rng.randbytes(rng.randrange(3)).replace(b"\n", b"") + text[place + 1 :]
    return text


def template(rng: random.Random) -> str:
    def said() -> str:
        return rng.choice(HEADS) + rng.choice(CONTENTS[:3] if rng.random() < 0.85 else CONTENTS)

    ends, first, prompt = rng.choice(["", "{{ eos_token }}", "\\n"]), rng.choice(HEADS[:6]), rng.choice(HEADS[:5])
    extra = rng.choice(EXTRA) if rng.random() < 0.15 else ""
    return (
        f"{first}{{% for m in messages %}}{extra}{{% if m.role == 'assistant' %}}{said()}{ends}{{% else %}}{said()}"
        f"{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )


def attempt(rng: random.Random, tokenizer: Any, path: Path) -> str:
    """One file and one template; what came of them in a word. Raises AssertionError if a rule is broken."""
    form = rng.choice(FORMS)  # of most records; a file of several forms is refused
    lines = [line(rng, form if rng.random() < 0.97 else rng.choice([*FORMS, []])) for _ in range(rng.randrange(1, 6))]
    path.write_bytes(b"\n".join(lines))
    tokenizer.chat_template = template(rng) if rng.random() < 0.9 else None
    try:
        data = read_data(str(path), skip_bad=True)
        options = {"on_prompt": rng.random() < 0.2, "packing": rng.random() < 0.3}
        found = encode(data, tokenizer, rng.choice([8, 64, 512, 512]), skip_bad=True, **options)
    except MwtoolError as fault:
        if "\n" in str(fault):
            raise ValueError("a message of several lines") from fault
        return "refused"
    read = [one for one in lines if one.strip()]
    assert len(data.examples) + len(data.unreadable) == len(read)
    taken = len(data.examples) - len(found.refused) - len(found.left_out)
    assert taken > 0
    lengths = sum(map(len, found.lengths))
    assert lengths >= taken if data.form == "text" else lengths == taken
    for ids, labels in zip(found.ids, found.labels, strict=True):
        assert (labels != IGNORED).any()
        assert ((labels == ids) | (labels == IGNORED)).all()
    return f"encoded {data.form}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="files to try")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    outcomes: Counter[str] = Counter()
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.count):
            rng = random.Random(args.seed * 1_000_003 + number)
            try:
                outcomes[attempt(rng, tokenizer, Path(folder) / "rows.jsonl")] += 1
            except Exception:  # noqa: BLE001 # whatever it is, it is a finding
                outcomes["BROKEN"] += 1
                print(f"--- number {number} of seed {args.seed}: template {tokenizer.chat_template!r}")
                traceback.print_exc(file=sys.stdout)
    print(f"{args.count:,} tried:", ", ".join(f"{count:,} {name}" for name, count in outcomes.most_common()))
    return 1 if outcomes["BROKEN"] else 0


if __name__ == "__main__":
    sys.exit(main())
