"""GGUF files that are damaged or cannot be read are refused in one line, whatever is in them."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import gguf
import gguf_files
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mwtool.errors import BadCheckpoint, ModelNotFound, MwtoolError, UnsupportedModel
from mwtool.models.gguf_header import read_header
from mwtool.models.load import load
from mwtool.models.locate import locate
from mwtool.scan.scanner import scan_checkpoint
from mwtool.scan.settings import Settings

WHOLE = Settings(k=1)
TENSORS, KEYS, ARRAY = 100_001, 100_001, 10_000_001


def announcing(path: Path, *, tensors: int = 0, keys: int = 0, entries: int = 0) -> Path:
    """A file with as much room as it announces, and nothing in it."""
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, keys or 1)
    if entries:
        head += struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 4, entries)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + 13 * keys + 32 * tensors + 4 * entries + 13)
    return path


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"tensors": TENSORS}, "announces 100,001 tensors; expected 100,000 at most"),
        ({"keys": KEYS}, "announces 100,001 metadata entries; expected 100,000 at most"),
        ({"entries": ARRAY}, "announces 10,000,001 numbers in a; expected 10,000,000 at most"),
    ],
)
def test_more_than_a_model_has_is_refused_before_it_is_read(counts: dict[str, int], words: str, tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=words):
        read_header(announcing(tmp_path / "x.gguf", **counts))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "tiny.gguf"
    gguf_files.written(path, gguf_files.small("llama"))
    return path


def patched(good: Path, to: Path, at: int, value: bytes) -> Path:
    data = bytearray(good.read_bytes())
    data[at : at + len(value)] = value
    to.write_bytes(data)
    return to


def behind(good: Path, text: str, occurrence: int = 0) -> int:
    """The offset behind a text in the file, counted by its occurrences."""
    data, at = good.read_bytes(), 0
    for _ in range(occurrence + 1):
        at = data.index(text.encode(), at) + len(text)
    return at


U32, U64 = struct.Struct("<I").pack, struct.Struct("<Q").pack
DAMAGE: dict[str, tuple[Callable[[Path], int], bytes, str]] = {
    "no magic": (lambda _: 0, b"GGML", r"begins with b'GGML'; expected b'GGUF'"),
    "version 1": (lambda _: 4, U32(1), r"GGUF version 1; expected 2 or 3"),
    "big-endian": (lambda _: 4, struct.pack(">I", 3), r"big-endian GGUF file; expected little-endian"),
    "too many tensors": (lambda _: 8, U64(2**60), r"announces 1,152,921,504,606,846,976 tensors, which do not fit"),
    "too many keys": (lambda _: 16, U64(2**60), r"metadata entries, which do not fit"),
    "a text past the end": (lambda _: 24, U64(2**40), r"1,099,511,627,776 bytes of a string, which do not fit"),
    "too many tokens": (lambda p: behind(p, "ggml.tokens") + 8, U64(2**50), r"strings in tokenizer.ggml.tokens"),
    "no such value type": (lambda p: behind(p, "llama.block_count"), U32(77), r"llama.block_count has value type 77"),
    "too many layers": (
        lambda p: behind(p, "llama.block_count") + 4,
        U32(10**6),
        r"block_count 1,000,000; its tensors",
    ),
    "no layers": (lambda p: behind(p, "llama.block_count") + 4, U32(0), r"block_count 0; expected a whole number"),
    "another width": (lambda p: behind(p, "llama.embedding_length") + 4, U32(2**30), r"token_embd.weight makes it 32"),
    "another head": (lambda p: behind(p, "attention.key_length") + 4, U32(2**30), r"attn_q.weight makes it"),
    "the same name twice": (lambda p: behind(p, "blk.1.") - 2, b"0", r"two tensors named blk.0.attn_q.weight"),
    "a type nobody knows": (lambda p: behind(p, "output_norm.weight") + 12, U32(999), r"stored as block type 999"),
    "an offset outside": (lambda p: behind(p, "output_norm.weight") + 16, U64(2**50), r"begins at byte 1,125,899,906"),
    "no dimensions": (lambda p: behind(p, "output_norm.weight"), U32(0), r"has 0 dimensions; expected 1 to 4"),
    "no entries": (lambda p: behind(p, "output_norm.weight") + 4, U64(0), r"has shape \(0,\), which is empty"),
    "no name in UTF-8": (lambda p: behind(p, "output_norm") - 3, b"\xff", r"is not UTF-8"),
    "half a block": (lambda p: behind(p, "output_norm.weight") + 12, U32(14), r"Q6_K needs a multiple of 256"),
    "a type without numbers": (lambda p: behind(p, "output_norm.weight") + 12, U32(26), r"I32, which the package gguf"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_header_is_refused_with_what_was_found(name: str, good: Path, tmp_path: Path) -> None:
    place, value, said = DAMAGE[name]
    bad = patched(good, tmp_path / "bad.gguf", place(good), value)
    with pytest.raises((BadCheckpoint, UnsupportedModel), match=said) as caught:
        locate(str(bad))
    assert str(bad) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_cut_short_anywhere_is_refused(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    for length in [*range(64), *range(64, len(data), 257), len(data) - 1]:
        (tmp_path / "short.gguf").write_bytes(data[:length])
        with pytest.raises(BadCheckpoint, match=r"short.gguf"):
            read_header(tmp_path / "short.gguf")


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mutated_file_is_refused_or_scanned(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(good.read_bytes())
    end = min(entry.offset for entry in read_header(good).tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, end))
        value = data.draw(st.sampled_from([b"\0", b"\xff", b"\x01", U32(2**31), U64(2**63), U64(2**20)]) | st.binary())
        content[at : at + len(value)] = value
    (tmp_path / "mutated.gguf").write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    mutated = str(tmp_path / "mutated.gguf")
    with suppress(MwtoolError):
        found = scan_checkpoint(mutated, WHOLE)
        assert len(found.states) == found.identity.layers


def test_an_architecture_that_is_not_known_is_refused_by_name(good: Path, tmp_path: Path) -> None:
    bad = patched(good, tmp_path / "bad.gguf", behind(good, "general.architecture") + 12, b"lllll")
    with pytest.raises(UnsupportedModel, match=r"architecture 'lllll'; of GGUF files gemma, .*llama.* can be read"):
        locate(str(bad))


def test_a_tensor_without_a_place_in_the_model_is_refused_by_name(good: Path, tmp_path: Path) -> None:
    bad = patched(good, tmp_path / "bad.gguf", behind(good, "output_norm.weight") - 11, b"nrom")
    with pytest.raises(UnsupportedModel, match=r"tensor output_nrom.weight, for which llama has no place"):
        locate(str(bad))


def test_a_tensor_that_is_absent_is_named(tmp_path: Path) -> None:
    made = gguf_files.small("llama")
    gguf_files.written(tmp_path / "less.gguf", made, without="blk.1.ffn_up.weight")
    with pytest.raises(BadCheckpoint, match=r"no tensor for model.layers.1.mlp.up_proj.weight"):
        scan_checkpoint(str(tmp_path / "less.gguf"), WHOLE)
    with pytest.raises(BadCheckpoint, match=r"no tensor for model.layers.1.mlp.up_proj.weight"):
        load(str(tmp_path / "less.gguf"))


def test_without_the_package_gguf_it_is_said_what_to_install(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(UnsupportedModel, match=r"pip install 'mwtool\[gguf\]'"):
        locate(str(good))


def test_a_part_that_is_absent_is_named(tmp_path: Path) -> None:
    gguf_files.written(tmp_path / "tiny.gguf", gguf_files.small("llama"), split=20)
    first, second = sorted(tmp_path.glob("tiny-*-of-00002.gguf"))
    second.unlink()
    with pytest.raises(BadCheckpoint, match=r"one of 2 parts, of which tiny-00002-of-00002.gguf is not there"):
        locate(str(first))
    shutil.copyfile(first, tmp_path / "renamed.gguf")
    with pytest.raises(BadCheckpoint, match=r"states that it is one of 2 parts; expected .* -00001-of-00002.gguf"):
        locate(str(tmp_path / "renamed.gguf"))
    shutil.copyfile(first, second)
    with pytest.raises(BadCheckpoint, match=r"split.no 0; expected 1"):
        locate(str(first))


def test_a_folder_of_several_models_asks_which(good: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf", "mmproj-a.gguf"):
        shutil.copyfile(good, tmp_path / name)
    with pytest.raises(ModelNotFound, match=r"2 GGUF models; say which with --gguf-file: a.gguf, b.gguf"):
        locate(str(tmp_path))
    with pytest.raises(ModelNotFound, match=r"has no c.gguf; its GGUF files are a.gguf, b.gguf"):
        locate(str(tmp_path), gguf_file="c.gguf")
    found = locate(str(tmp_path), gguf_file="b.gguf")
    assert (found.name, found.gguf_file) == (str(tmp_path / "b.gguf"), None)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("GG", encoding="utf-8")
    with pytest.raises(ModelNotFound, match=r"notes.txt is a file; expected a GGUF file or a folder"):
        locate(str(tmp_path / "notes.txt"))
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(BadCheckpoint, match=r"empty.gguf is empty; expected a GGUF file"):
        locate(str(tmp_path / "empty.gguf"))
    (tmp_path / "lfs.gguf").write_text("version https://git-lfs.github.com/spec/v1", encoding="utf-8")
    with pytest.raises(BadCheckpoint, match=r"Git LFS pointer"):
        locate(str(tmp_path / "lfs.gguf"))


def test_rotary_scaling_that_is_not_converted_hinders_texts_but_no_scan(tmp_path: Path) -> None:
    def scaled(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)

    gguf_files.written(tmp_path / "tiny.gguf", gguf_files.small("llama"), change=scaled)
    assert scan_checkpoint(str(tmp_path / "tiny.gguf"), WHOLE).states
    with pytest.raises(UnsupportedModel, match=r"rotary scaling 'longrope', which is not converted; it can be scanned"):
        load(str(tmp_path / "tiny.gguf"))
