"""Hostile and absurd files beside a model's weights: one line, no traceback, and no code of theirs runs."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command import Ran, run
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from words import planted_folder

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
DEEP_WITHIN = ', "zz": ' + "[" * 100_000 + "]" * 100_000 + "}"
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "adapter_config.json")


class Marks:
    """Pickled, it is a call that leaves a mark where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and an adapter of it in the folder beside it."""
    work = tmp_path_factory.mktemp("intact")
    model = planted_folder(work / "model", num_hidden_layers=2)
    (work / "t.txt").write_text(" ".join(f"w{n % 40 + 3}" for n in range(200)))
    (work / "d.jsonl").write_text('{"instruction": "w3", "output": "w4"}\n' * 4)
    adapted: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(work / "adapter")
    return work


@pytest.fixture
def work(intact: Path, tmp_path: Path) -> Path:
    shutil.copytree(intact, tmp_path / "work")
    change(tmp_path / "work/adapter/adapter_config.json", base_model_name_or_path=str(tmp_path / "work/model"))
    return tmp_path / "work"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))


def everything(work: Path, model: str) -> list[Ran]:
    """Every command that opens a model."""
    folder, task = work / model, ("--task", f"ppl:{work / 't.txt'}", "--window", "32")
    training = ("--data", work / "d.jsonl", "--eval-share", "0", "--effective-batch", "1", "--batch-size", "1")
    return [
        run("scan", folder),
        run("eval", folder, *task),
        run("ablate", folder, *task, "--layer", 1, "--indices", 3, "--no-controls"),
        run("finetune", folder, *training, "--dry-run", "--macdrop", "none", "--target-modules", "q_proj"),
    ]


@pytest.mark.parametrize("whole", [True, False], ids=["all of it", "an unknown key"])
@pytest.mark.parametrize("file", FILES)
def test_json_nested_100_000_deep_is_one_line(work: Path, file: str, *, whole: bool) -> None:
    model = "adapter" if file.startswith("adapter") else "model"
    path = work / model / file
    if not path.exists():
        path.write_text('{"a": 1}')
    path.write_text(DEEP if whole else path.read_text().rstrip().removesuffix("}") + DEEP_WITHIN)
    ran = everything(work, model)
    assert any(one.code for one in ran)
    for one in ran:
        assert one.code == 0 or one.fault


def test_an_index_nested_100_000_deep_is_one_line(work: Path) -> None:
    (work / "model/model.safetensors").unlink()
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (work / "model" / name).write_text(DEEP)
        for one in everything(work, "model")[:3]:
            assert f"{name} is nested too deeply" in one.fault
        (work / "model" / name).unlink()


@pytest.mark.parametrize("value", ["x", [1], {}, True, -5, 0, 10**400, 1e308, None], ids=lambda value: str(value)[:9])
def test_an_absurd_model_max_length_is_one_line_or_means_nothing(work: Path, value: Any) -> None:
    change(work / "model/tokenizer_config.json", model_max_length=value)
    for one in everything(work, "model"):
        assert one.code == 0 or f"states model_max_length {value!r}; expected a number" in one.fault
    assert isinstance(value, int | float | None) or one.code == 1


STATED: list[tuple[str, Any]] = [
    *[("vocab_size", value) for value in ("x", 2, 0, -1, 10**12)],
    *[("hidden_size", value) for value in ("x", 0, -1, 10**9, 33, True)],
    *[("intermediate_size", value) for value in (65, None)],
    *[("num_attention_heads", value) for value in (0, 3, "x")],
    *[("num_hidden_layers", value) for value in ("x", 0, -1, None, 1.5)],
    *[("text_config", value) for value in (5, "x", [], {})],
    *[("rope_parameters", value) for value in ("x", 5, {"rope_type": "x"})],
    *[("head_dim", value) for value in (0, -1, 10**6)],
    *[("hidden_act", value) for value in ("x", 3, None)],
    *[("quantization_config", value) for value in ("x", {}, [1], {"quant_method": "x"})],
    *[("architectures", value) for value in ("x", [3], {})],
    *[("model_type", value) for value in (3, ["x"], None, "")],
    *[("dtype", value) for value in ("x", 3, "int8")],
    *[("bos_token_id", value) for value in ("x", [1], 10**30, -1)],
    *[("pad_token_id", value) for value in ("x", [1], 10**30, -100)],
    *[("transformers_weights", value) for value in (3, "../x.safetensors", "x.safetensors", "config.json")],
    *[("rms_norm_eps", value) for value in ("x", None)],
]


@pytest.mark.parametrize(("key", "value"), STATED, ids=lambda value: str(value)[:24])
def test_an_absurd_configuration_is_one_line_or_means_nothing(work: Path, key: str, value: Any) -> None:
    change(work / "model/config.json", **{key: value})
    for one in everything(work, "model"):
        assert one.code == 0 or one.fault


ADAPTER: list[tuple[str, Any]] = [
    *[("lora_alpha", value) for value in ("x", [1], {})],
    *[("r", value) for value in ("x", 0, -1, 10**12, None)],
    *[("target_modules", value) for value in (5, ["absent"], "(", [])],
    *[("peft_type", value) for value in ("x", 3, None)],
    *[("lora_dropout", value) for value in ("x", 5)],
    *[("rank_pattern", value) for value in (3, {"q_proj": "x"})],
    *[("alpha_pattern", value) for value in (3, {"q_proj": "x"})],
    *[("layers_to_transform", value) for value in ("x", [99])],
    *[("modules_to_save", value) for value in (3, ["absent"])],
    *[("base_model_name_or_path", value) for value in (7, "", None, "/nowhere", "~nobody/x", "a\0b")],
]


@pytest.mark.parametrize(("key", "value"), ADAPTER, ids=lambda value: ascii(value)[:24])
def test_an_absurd_adapter_is_one_line_or_means_nothing(work: Path, key: str, value: Any) -> None:
    change(work / "adapter/adapter_config.json", **{key: value})
    for one in everything(work, "adapter"):
        assert one.code == 0 or one.fault


@pytest.mark.parametrize("kind", ["pickle", "archive", "junk", "nothing", "number", "nested"])
def test_what_is_no_state_dict_in_a_bin_file_is_one_line_and_never_runs(work: Path, kind: str) -> None:
    mark = work / "ran"
    for model, file in (("adapter", "adapter_model"), ("model", "model")):
        (work / model / f"{file}.safetensors").unlink()
        path = work / model / f"{file if model == 'adapter' else 'pytorch_model'}.bin"
        if kind == "archive":
            torch.save(Marks(mark), path)
        else:
            nested: Any = []
            for _ in range(100):
                nested = [nested]
            made = {"pickle": Marks(mark), "number": 3, "nested": nested}
            path.write_bytes(pickle.dumps(made[kind]) if kind in made else b"junk" if kind == "junk" else b"")
    shutil.copytree(work / "model", work / "broken")
    for one in everything(work, "broken")[:3]:
        assert "pytorch_model.bin" in one.fault
    made_whole = tiny.saved(work / "whole", AutoModelForCausalLM.from_config(_config(work / "model")))
    change(work / "adapter/adapter_config.json", base_model_name_or_path=str(made_whole))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(work / "model" / file, made_whole)
    for one in everything(work, "adapter")[1:3]:
        assert "cannot be applied" in one.fault
    assert not mark.exists()


def _config(folder: Path) -> Any:
    return AutoConfig.from_pretrained(folder)


YAML = {
    "a tag that does not fit": "k: !!int x",
    "a float": "k: !!float x",
    "a timestamp": "k: !!timestamp x",
    "a date": "k: 2026-99-99",
    "python": 'k: !!python/object/apply:os.system ["true"]',
    "nested": "[" * 100_000,
    "nested maps": "\n".join(" " * depth + "a:" for depth in range(3000)),
    "5,000 digits": "k: " + "9" * 5000,
    "NUL": 'k: "\0"',
    "a key that is a list": "? [a]\n: 3",
    "a merge of nothing": "<<: 3",
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_cannot_be_used_is_a_usage_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(YAML[name])
    ran = run("scan", "demo", "--config", path)
    assert (ran.code, ran.out) == (2, "")
    assert "Traceback" not in ran.err
    assert "set_int_max_str_digits" not in ran.err  # advice for those who program
    path.write_text(YAML[name].replace("k:", "schedule:"))
    assert run("finetune", "demo", "--data", "x", "--dry-run", "--macdrop", path).code == 1
