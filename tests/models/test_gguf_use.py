"""GGUF files wherever a MODEL is taken: folders, the Hub, parts, texts, attacks, fine-tuning, saving."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import hub
import numpy as np
import pytest
import tiny
import torch
from command import run
from gguf_files import TEXTS, Kind
from huggingface_hub import constants, utils
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mwtool.models.load import load
from mwtool.models.locate import locate
from mwtool.models.source import DEMO
from mwtool.scan.scanner import scan_checkpoint
from mwtool.scan.settings import Settings


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in Q8_0, which keeps what its rows do."""
    path = tmp_path_factory.mktemp("demo") / "demo.Q8_0.gguf"
    gguf_files.written(path, AutoModelForCausalLM.from_pretrained(DEMO), Kind.Q8_0)
    return path


def test_a_scan_names_rows_as_the_file_does(demo: Path) -> None:
    found = run("scan", demo, "--json").document
    assert (found["massive"]["layer"], found["massive"]["indices"][0]) == (1, 148)
    assert found["bos"] == {"id": 1, "token": "<s>", "how": "tokenizer"}
    places = {place["parameter"]: place["checkpoint_name"] for place in found["weights"]}
    assert places == {
        f"model.layers.1.mlp.{part}_proj.weight": f"blk.1.ffn_{part}.weight" for part in ("gate", "up", "down")
    }


def test_the_vocabulary_is_not_read_to_find_bos(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = locate(str(demo))
    assert source.gguf is not None
    monkeypatch.setattr(type(source.gguf), "tokenizer", lambda _: pytest.fail("the vocabulary was read"))
    vocabulary = source.vocabulary()
    assert vocabulary is not None
    tokens = AutoTokenizer.from_pretrained(DEMO).convert_ids_to_tokens(list(range(len(vocabulary))))
    assert [vocabulary.convert_ids_to_tokens(index) for index in (0, 1, 700, 4095, 4096)] == [
        *(tokens[index] for index in (0, 1, 700, 4095)),
        None,
    ]


@TEXTS
def test_the_tokenizer_of_a_file_is_the_model_s(demo: Path) -> None:
    mine, theirs = locate(str(demo)).tokenizer(), AutoTokenizer.from_pretrained(DEMO)
    assert mine is not None
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")[:5000]
    assert mine(text).input_ids == theirs(text).input_ids
    assert (mine.bos_token, mine.eos_token) == (theirs.bos_token, theirs.eos_token)


@TEXTS
@pytest.mark.parametrize("bos", ["never", "<s>", "7"])
def test_every_choice_of_bos_is_that_of_the_checkpoint(bos: str, demo: Path) -> None:
    chosen = [run("scan", model, "--bos", bos, "--json").document["bos"] for model in (demo, "demo")]
    assert chosen[0] == chosen[1]


def test_a_split_file_is_one_model_whichever_part_is_named(tmp_path: Path) -> None:
    made = gguf_files.small("llama")
    gguf_files.written(tmp_path / "whole.gguf", made)
    (tmp_path / "parts").mkdir()
    gguf_files.written(tmp_path / "parts" / "tiny.gguf", made, split=10)
    parts = sorted((tmp_path / "parts").iterdir())
    assert len(parts) > 2
    whole = scan_checkpoint(str(tmp_path / "whole.gguf"), Settings())
    for part in (parts[0], parts[-1], tmp_path / "parts"):
        found = scan_checkpoint(str(part), Settings())
        for mine, theirs in zip(found.states, whole.states, strict=True):
            assert torch.equal(mine.hidden, theirs.hidden)


def test_a_folder_with_one_file_is_that_file_and_weights_beside_it_come_first(demo: Path, tmp_path: Path) -> None:
    assert locate(str(demo.parent)).gguf is not None
    made = gguf_files.small("llama")
    held = gguf_files.written(tmp_path / "tiny.gguf", made)
    folder = gguf_files.folder(tmp_path / "both", made.config, held, torch.float32)
    (tmp_path / "tiny.gguf").rename(folder / "tiny.gguf")
    assert locate(str(folder)).gguf is None
    assert locate(str(folder), gguf_file="tiny.gguf").gguf is not None
    (folder / "model.safetensors").unlink()
    assert locate(str(folder)).gguf is not None


@pytest.fixture
def served(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub.Hub]:
    with hub.serving() as here:
        here.repos["some/model-GGUF"] = demo.parent
        monkeypatch.setattr(constants, "ENDPOINT", here.endpoint)
        template = here.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield here
    utils.close_session()


def test_a_repository_is_scanned_by_id_and_again_without_the_hub(
    served: hub.Hub, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run("scan", "some/model-GGUF", "--json")
    assert found.code == 0, found.err
    local = run("scan", demo, "--json").document
    assert found.document["massive"] == local["massive"]
    assert (found.document["model"], found.document["revision"]) == ("some/model-GGUF", hub.COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = run("scan", "some/model-GGUF", "--gguf-file", demo.name, "--json")
    assert again.document["massive"] == local["massive"]
    absent = run("scan", "some/model-GGUF", "--gguf-file", "other.gguf")
    assert absent.fault == f"some/model-GGUF has no other.gguf; its GGUF files are {demo.name}"


def llama3(config: Any) -> Callable[[gguf.GGUFWriter], None]:
    """The factors of llama.cpp's conversion/llama.py."""
    rope, width = config.rope_parameters, config.head_dim
    factors = []
    for index in range(0, width, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (index / width)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        factors.append(1 if wavelength < 8192 / 4 else rope["factor"] if wavelength > 8192 else between)
    return lambda writer: writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))


def longrope(config: Any) -> Callable[[gguf.GGUFWriter], None]:
    rope = config.rope_parameters

    def change(writer: gguf.GGUFWriter) -> None:
        original = rope["original_max_position_embeddings"]
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        for which in ("long", "short"):
            writer.add_tensor(f"rope_factors_{which}.weight", np.array(rope[f"{which}_factor"], np.float32))

    return change


def scaled(config: Any) -> Callable[[gguf.GGUFWriter], None]:
    rope = config.rope_parameters

    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if "original_max_position_embeddings" in rope:
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])

    return change


THETA = {"rope_theta": 500000.0}
ROTARY: dict[str, tuple[str, Callable[[Any], Any], dict[str, Any], dict[str, Any]]] = {
    "llama3": (
        "llama",
        llama3,
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            **THETA,
        },
        {"head_dim": 32},
    ),
    "linear": ("llama", scaled, {"rope_type": "linear", "factor": 4.0, **THETA}, {}),
    "yarn": (
        "qwen2",
        scaled,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **THETA},
        {"max_position_embeddings": 64},
    ),
    "longrope": (
        "phi3",
        longrope,
        {
            "rope_type": "longrope",
            "long_factor": [2.0, 3.0, 5.0, 7.0],
            "short_factor": [1.0, 1.5, 2.0, 2.5],
            "original_max_position_embeddings": 16,
            **THETA,
        },
        {"max_position_embeddings": 64, "original_max_position_embeddings": 16},
    ),
}


@TEXTS
@pytest.mark.parametrize("name", ROTARY)
def test_rotary_scaling_is_that_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    model_type, change, parameters, options = ROTARY[name]
    made = tiny.model(model_type, num_hidden_layers=2, rope_parameters=parameters, **options)
    held = gguf_files.written(tmp_path / "tiny.gguf", made, change=change(made.config))
    same = load(str(gguf_files.folder(tmp_path / "same", made.config, held, torch.float32))).base
    loaded = load(str(tmp_path / "tiny.gguf")).base
    plain = tiny.model(model_type, num_hidden_layers=2, **options)
    plain.load_state_dict(same.state_dict())
    ids = torch.arange(40)[None]
    with torch.no_grad():
        logits, expected, unscaled = loaded(ids).logits, same(ids).logits, plain(ids).logits
    assert torch.equal(logits, expected)
    assert not torch.equal(logits, unscaled)


@TEXTS
def test_an_attack_on_a_file_is_measured_and_saved_as_a_checkpoint(demo: Path, tmp_path: Path) -> None:
    asked = ("--layer", 1, "--indices", "148", "-k", 1, "--mode", "zero", "--no-controls", "--limit", 2, "--json")
    ran = run("ablate", demo, *asked, "--save", tmp_path / "saved")
    assert ran.code == 0, ran.err
    (zeroed,) = ran.document["runs"]
    assert zeroed["ratio"]["ppl:demo"] > 1.5
    saved = run("eval", tmp_path / "saved", "--limit", 2, "--json").document
    assert saved["results"][0]["value"] == pytest.approx(zeroed["results"]["ppl:demo"], rel=1e-12)
    assert AutoConfig.from_pretrained(tmp_path / "saved").model_type == "llama"


@TEXTS
def test_an_adapter_is_trained_on_a_file_and_evaluated_over_it(demo: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"Once there was a number {n}."}) for n in range(8)))
    asked = ("--data", data, "--max-steps", 2, "--batch-size", 2, "--effective-batch", 2, "--max-length", 32)
    ran = run("finetune", demo, *asked, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(demo)
    evaluated = run("eval", tmp_path / "out", "--limit", 1, "--json")
    assert evaluated.code == 0, evaluated.err
    assert evaluated.document["adapter"] == str(tmp_path / "out")
