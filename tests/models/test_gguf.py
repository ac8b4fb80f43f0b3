"""GGUF files: what a scan finds in one is what it finds in the checkpoint it amounts to, bit for bit."""

from __future__ import annotations

from pathlib import Path

import gguf_files
import pytest
import torch
from gguf_files import ARCHITECTURES, Kind

from mwtool.models.load import load
from mwtool.scan.scanner import Scan, Settings, scan_checkpoint

WALK = Settings(k=3)
KINDS = "F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q6_K".split()


def assert_same(one: Scan, other: Scan) -> None:
    assert len(one.states) == len(other.states) == one.identity.layers
    for mine, theirs in zip(one.states, other.states, strict=True):
        assert torch.equal(mine.hidden, theirs.hidden)
        assert torch.equal(mine.intermediate, theirs.intermediate)
    assert one.parameters == other.parameters
    assert one.bos == other.bos
    assert (one.identity.model_type, one.dtype) == (other.identity.model_type, other.dtype)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_file_of_each_type_has_the_states_of_its_checkpoint(model_type: str, tmp_path: Path) -> None:
    made = gguf_files.small(model_type)
    held = gguf_files.written(tmp_path / "tiny.gguf", made)
    same = gguf_files.folder(tmp_path / "same", made.config, held, torch.float32)
    assert_same(scan_checkpoint(str(tmp_path / "tiny.gguf"), WALK), scan_checkpoint(str(same), WALK))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_each_kind_of_block_has_the_states_of_its_checkpoint(kind: str, dtype: str, tmp_path: Path) -> None:
    made = gguf_files.plain("llama")
    held = gguf_files.written(tmp_path / "tiny.gguf", made, Kind[kind])
    same = gguf_files.folder(tmp_path / "same", made.config, held, getattr(torch, dtype))
    found = scan_checkpoint(str(tmp_path / "tiny.gguf"), WALK, dtype=dtype)
    assert_same(found, scan_checkpoint(str(same), WALK))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_file_loaded_whole_is_its_checkpoint(model_type: str, tmp_path: Path) -> None:
    made = gguf_files.small(model_type)
    held = gguf_files.written(tmp_path / "tiny.gguf", made)
    same = load(str(gguf_files.folder(tmp_path / "same", made.config, held, torch.float32)))
    loaded = load(str(tmp_path / "tiny.gguf"))
    weights, expected = loaded.base.state_dict(), same.base.state_dict()
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []
    ids = torch.arange(24)[None] % made.config.vocab_size
    with torch.no_grad():
        assert torch.equal(loaded.base(ids).logits, same.base(ids).logits)
