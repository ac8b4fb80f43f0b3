"""GGUF files: a scan reads from one the weights of the checkpoint it amounts to, and finds the same in both."""

from __future__ import annotations

from pathlib import Path

import gguf_files
import pytest
import torch
from gguf_files import ARCHITECTURES, TEXTS, Kind

from mwtool.models.checkpoint import open_checkpoint
from mwtool.models.load import load
from mwtool.models.locate import locate
from mwtool.scan.scanner import scan_checkpoint
from mwtool.scan.settings import Settings

WALK = Settings(k=3)
KINDS = "F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q6_K".split()


def assert_same(file: Path, folder: Path, dtype: str = "auto") -> None:
    """The same weights bit for bit, and states within 1e-5.

    On some processors the last bits of a matrix product depend on where its weights lie in memory, which the header of
    a safetensors file decides.
    """
    ours, theirs = open_checkpoint(locate(str(file))), open_checkpoint(locate(str(folder)))
    with ours.whole() as held, theirs.whole() as expected:
        assert held.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(held[name][...].to(value[...].dtype), value[...]), name
    one, other = (scan_checkpoint(str(path), WALK, dtype=dtype) for path in (file, folder))
    assert len(one.states) == len(other.states) == one.identity.layers
    for mine, state in zip(one.states, other.states, strict=True):
        torch.testing.assert_close(mine.hidden, state.hidden, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine.intermediate, state.intermediate, rtol=1e-5, atol=1e-5)
    assert one.parameters == other.parameters
    assert one.bos == other.bos
    assert (one.identity.model_type, one.dtype) == (other.identity.model_type, other.dtype)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_file_of_each_type_has_the_states_of_its_checkpoint(model_type: str, tmp_path: Path) -> None:
    made = gguf_files.small(model_type)
    held = gguf_files.written(tmp_path / "tiny.gguf", made)
    same = gguf_files.folder(tmp_path / "same", made.config, held, torch.float32)
    assert_same(tmp_path / "tiny.gguf", same)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_each_kind_of_block_has_the_states_of_its_checkpoint(kind: str, dtype: str, tmp_path: Path) -> None:
    made = gguf_files.plain("llama")
    held = gguf_files.written(tmp_path / "tiny.gguf", made, Kind[kind])
    same = gguf_files.folder(tmp_path / "same", made.config, held, getattr(torch, dtype))
    assert_same(tmp_path / "tiny.gguf", same, dtype)


@TEXTS
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
