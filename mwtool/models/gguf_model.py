"""A model in one GGUF file or in the parts it was split into: its configuration, tensors and tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mwtool.errors import BadCheckpoint, UnsupportedModel, line_of
from mwtool.models.gguf_architectures import Conversion, conversion
from mwtool.models.gguf_checkpoint import check_dequantizable
from mwtool.models.gguf_header import Header, StringArray, TensorEntry, read_header, read_strings

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
"""How llama.cpp names the parts of a split file, counted from 1."""
TOKENS = "tokenizer.ggml.tokens"
UNBUILDABLE = (ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError, OSError)
"""What transformers raises over a vocabulary that it can read but not use."""


@dataclass(frozen=True, slots=True, eq=False)
class GGUFModel:
    """What a GGUF file's header says, and what that is in transformers' terms."""

    header: Header
    conversion: Conversion

    @property
    def path(self) -> Path:
        """The file, or its first part."""
        return self.header.path

    def config(self) -> PretrainedConfig:
        """The configuration; `dtype` is what the weights are stored in, bfloat16 where that is blocks."""
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        values = dict(self.conversion.config)
        kind = values.pop("model_type")
        try:
            config: PretrainedConfig = AutoConfig.for_model(
                kind,
                architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]],
                name_or_path=str(self.path),
                dtype=self.dtype,
                **values,
            )
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, StrictDataclassError) as fault:
            raise BadCheckpoint(f"{self.path} describes no {kind} that can be built: {line_of(fault)}") from fault
        return config

    @property
    def dtype(self) -> str:
        """The plain type that the matrices are stored in; bfloat16 where any is stored in blocks."""
        kinds = {entry.block_type.name for entry in self.header.tensors.values() if len(entry.shape) > 1}
        if kinds == {"F32"}:
            return "float32"
        return "float16" if kinds <= {"F16", "F32"} else "bfloat16"

    def refuse_rotary_fault(self) -> None:
        """Raise UnsupportedModel where texts would be computed wrongly; a scan, of one position, would not be."""
        if self.conversion.rotary_fault is not None:
            raise UnsupportedModel(
                f"{self.path} has {self.conversion.rotary_fault}, which is not converted; it can be scanned, but for "
                f"anything that reads text give the model it was made from"
            )

    def vocabulary(self) -> Vocabulary | None:
        """The special tokens, without the vocabulary; None where the file has no tokenizer."""
        tokens = self.header.metadata.get(TOKENS)
        return Vocabulary(self, tokens) if isinstance(tokens, StringArray) else None

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, as transformers builds it from the file; None where it has none.

        Raises BadCheckpoint if there is one that transformers cannot build.
        """
        if not isinstance(self.header.metadata.get(TOKENS), StringArray):
            return None
        from transformers import PreTrainedTokenizerFast

        try:
            # not AutoTokenizer, which reads the whole file for its configuration first
            tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
                self.path.parent, gguf_file=self.path.name, local_files_only=True
            )
        except UNBUILDABLE as fault:
            raise BadCheckpoint(f"the tokenizer in {self.path} cannot be built: {line_of(fault)}") from fault
        return tokenizer


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """As much of a tokenizer as finding bos needs; token texts are looked up in the file one by one."""

    model: GGUFModel
    tokens: StringArray

    @property
    def bos_token_id(self) -> int | None:
        """The id `tokenizer.ggml.bos_token_id`, whether llama.cpp puts it before a text by itself or not."""
        return self.model.conversion.config["bos_token_id"]  # type: ignore[no-any-return] # built by _common

    @property
    def bos_token(self) -> str | None:
        """The text of bos."""
        return None if self.bos_token_id is None else self.convert_ids_to_tokens(self.bos_token_id)

    @property
    def eos_token_id(self) -> int | None:
        """The id `tokenizer.ggml.eos_token_id`."""
        return self.model.conversion.config["eos_token_id"]  # type: ignore[no-any-return] # built by _common

    def __len__(self) -> int:
        return self.tokens.count

    def convert_ids_to_tokens(self, index: int) -> str | None:
        """One token's text; None for an id outside the vocabulary."""
        return read_strings(self.model.path, self.tokens, index) if 0 <= index < len(self) else None

    def get_vocab(self) -> dict[str, int]:
        """All tokens, read for this."""
        return self._whole().get_vocab()

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any:
        """A text's tokens, by the whole tokenizer, read for this."""
        return self._whole()(text, add_special_tokens=add_special_tokens)

    def _whole(self) -> PreTrainedTokenizerBase:
        tokenizer = self.model.tokenizer()
        assert tokenizer is not None, "there is an array of tokens"
        return tokenizer


def open_gguf(path: Path, part: Callable[[str], Path | None] | None = None) -> GGUFModel:
    """Read the header of a GGUF file, of all parts if it is one of several.

    part: where a part of this name is, or None if nowhere; by default it is looked for beside `path`.
    Raises BadCheckpoint for a damaged file or an absent part, UnsupportedModel for what cannot be read.
    """
    names = parts_of(path.name)
    headers = []
    for name in names:
        place = path if name == path.name else (part or _beside(path))(name)
        if place is None:
            raise BadCheckpoint(
                f"{path} is one of {len(names)} parts, of which {name} is not there; expected it in the same folder"
            )
        headers.append(read_header(place))
    header = _joined(headers)
    check_dequantizable(header.path, header.tensors.values())
    return GGUFModel(header, conversion(header))


def parts_of(name: str) -> list[str]:
    """The names of all parts of a split file, in order; of another file its own name."""
    match = PART.fullmatch(name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]):
        return [name]
    return [f"{match['stem']}-{number:05}-of-{match['count']}.gguf" for number in range(1, int(match["count"]) + 1)]


def models_among(names: Sequence[str]) -> list[str]:
    """Of these names, one for each GGUF model: the first part of a split one; projectors for images are none."""
    found = {parts_of(Path(name).name)[0]: name for name in sorted(names, reverse=True) if name.endswith(".gguf")}
    return sorted(name for first, name in found.items() if not first.startswith("mmproj"))


def _beside(path: Path) -> Callable[[str], Path | None]:
    def find(name: str) -> Path | None:
        place = path.with_name(name)
        return place if place.exists() else None

    return find


def _joined(headers: list[Header]) -> Header:
    """One header for all parts, with the first one's metadata. Raises BadCheckpoint where they do not fit together."""
    first, *others = headers
    stated = first.metadata.get("split.count", 1)
    if stated not in (len(headers), 0):
        raise BadCheckpoint(
            f"{first.path} states that it is one of {stated} parts; expected it and the others under names that end in "
            f"-00001-of-{stated:0>5}.gguf and so on"
        )
    tensors: dict[str, TensorEntry] = dict(first.tensors)
    for number, header in enumerate(others, start=1):
        if header.metadata.get("split.no") != number:
            raise BadCheckpoint(
                f"{header.path} states split.no {header.metadata.get('split.no')}; expected {number} by its name"
            )
        twice = next((name for name in header.tensors if name in tensors), None)
        if twice is not None:
            raise BadCheckpoint(f"{header.path} holds tensor {twice}, which an earlier part holds; get the parts again")
        tensors |= header.tensors
    total = first.metadata.get("split.tensors.count", len(tensors))
    if others and total != len(tensors):
        raise BadCheckpoint(
            f"{first.path} states {total} tensors in all parts; they hold {len(tensors)}: get them again"
        )
    return replace(first, tensors=tensors)
