"""A model that was located: a Hub id, a local folder, a PEFT adapter folder, a GGUF file, or `demo`.

Everything is turned into a local folder with at least the small files (configuration,
tokenizer, weight index). Weight files of a Hub repository are fetched when they are
first read, so that a scan that stops at layer 6 does not download layer 79.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mwtool.architecture.registry import register
from mwtool.errors import BadCheckpoint, UnsupportedModel, line_of
from mwtool.files.text import read_json, shown
from mwtool.models.gguf_model import GGUFModel, Vocabulary
from mwtool.models.hub import fetch
from mwtool.models.load_options import Download

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

DEMO = Path(str(resources.files("mwtool.demo")))
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.py", *ADAPTER_FILES]
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.bin.index.json", "adapter_model.bin")
"""A folder that holds none of these and a GGUF file is that file's, whether it has a config.json or not."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json", "vocab.txt")
OTHER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model that has been located but not loaded.

    name: what the user asked for, or the base model an adapter folder points to.
    folder: where its small files are.
    repo: Hub id the weight files are fetched from; None for a local folder.
    revision: commit hash on the Hub; None for a local folder.
    adapter: folder of the PEFT adapter that was asked for, where this is its base model.
    notes: what was decided on the user's behalf, one sentence each.
    gguf: the model's GGUF file, where it is one; then `folder` need not hold anything else.
    download: whether weight files of the Hub are fetched whole, or of those not in the cache only what is read.
    """

    name: str
    folder: Path
    repo: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    adapter: str | None = None
    notes: tuple[str, ...] = ()
    gguf: GGUFModel | None = None
    download: Download = "whole"

    @property
    def reference(self) -> str:
        """What a PEFT adapter's configuration calls this model as its base: a Hub id, or where it lies."""
        if self.gguf is not None:
            return str(self.gguf.path.absolute())
        return self.repo or str(self.folder.resolve())

    @property
    def gguf_file(self) -> str | None:
        """Which file of a Hub repository it is, to find it again; None where the name says so already."""
        return None if self.gguf is None or self.repo is None else self.gguf.path.name

    def path(self, file: str) -> Path | None:
        """Where a file of the model is, fetched from the Hub if need be; None if the model has no such file.

        Raises ModelNotFound if the Hub refuses it or cannot be reached.
        """
        local = self.folder / file
        if local.exists():
            return local
        return None if self.repo is None else fetch(self.repo, file, self.revision)

    def config(self) -> PretrainedConfig:
        """The configuration; raises BadCheckpoint if it is damaged, UnsupportedModel if it is not a causal LM's."""
        from transformers import AutoConfig

        from mwtool.models.depth import check_depth  # which opens checkpoints, which know sources

        if self.gguf is not None:
            return self.gguf.config()
        raw = read_json(self.folder / "config.json")
        _refuse_foreign(self.name, raw)
        check_depth(self, raw)
        register(raw["model_type"], own_code="auto_map" in raw)
        try:
            with _silent():
                config: PretrainedConfig = AutoConfig.from_pretrained(
                    self.folder, trust_remote_code=self.trust_remote_code, local_files_only=self.repo is None
                )
        except unusable() as fault:
            advice = ""
            if "auto_map" in raw and not self.trust_remote_code:
                advice = "; it ships code of its own, which runs only with --trust-remote-code"
            raise BadCheckpoint(f"{self.folder / 'config.json'} cannot be used: {line_of(fault)}{advice}") from fault
        depth = getattr(config.get_text_config(), "num_hidden_layers", None)
        if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
            raise BadCheckpoint(
                f"{self.folder / 'config.json'} states {shown(depth)} decoder layers; expected at least 1"
            )
        width = getattr(config.get_text_config(), "hidden_size", None)
        if isinstance(width, int) and width < 1:
            raise BadCheckpoint(f"{self.folder / 'config.json'} states hidden_size {width}; expected at least 1")
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, or None where the folder has none.

        Raises BadCheckpoint if it has one that cannot be read.
        """
        if self.gguf is not None:
            with _silent():
                return self.gguf.tokenizer()
        if not any((self.folder / file).exists() for file in TOKENIZER_FILES):
            return None
        from transformers import AutoTokenizer

        try:
            with _silent():
                tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                    self.folder, trust_remote_code=self.trust_remote_code, local_files_only=self.repo is None
                )
                if isinstance(tokenizer.model_max_length, int | float):  # else said below
                    tokenizer("\u0001")  # an unknown character: some parts are first looked at then
        except Exception as fault:  # the tokenizers library raises nothing more specific
            needed = (self.folder / "tokenizer.model").exists() and find_spec("sentencepiece") is None
            advice = "; a tokenizer.model needs `pip install sentencepiece protobuf`" if needed else ""
            raise BadCheckpoint(f"the tokenizer in {self.folder} cannot be read: {line_of(fault)}{advice}") from fault
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # a vocabulary that cannot be read may pass for none
            raise BadCheckpoint(
                f"the tokenizer in {self.folder} has no vocabulary: its files are damaged; get it again"
            )
        limit: object = tokenizer.model_max_length
        if not isinstance(limit, int | float):
            raise BadCheckpoint(
                f"{self.folder / 'tokenizer_config.json'} states model_max_length {shown(limit)}; expected a number"
            )
        return tokenizer

    def vocabulary(self) -> PreTrainedTokenizerBase | Vocabulary | None:
        """What finds bos: the tokenizer, or of a GGUF file as much of it as that takes."""
        return self.tokenizer() if self.gguf is None else self.gguf.vocabulary()


def unusable() -> tuple[type[Exception], ...]:
    """What transformers raises over a configuration or tokenizer that it can read but not use."""
    from huggingface_hub.errors import StrictDataclassError

    plain = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, ImportError, RuntimeError, OSError)
    return (*plain, AssertionError, MemoryError, struct.error, re.error, StrictDataclassError)


def model_class(config: PretrainedConfig) -> Any:
    """The automatic class that builds models of this configuration with a language-modelling head.

    Models of images and text that transformers does not count among the causal ones have a class of their own.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    kind = type(config)
    seeing = kind not in MODEL_FOR_CAUSAL_LM_MAPPING and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if seeing else AutoModelForCausalLM


def _refuse_foreign(name: str, raw: dict[str, Any]) -> None:
    """Stop early where the configuration says that this is not a causal language model."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )

    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise BadCheckpoint(f"the config.json of {name} has no model_type; expected a transformers configuration")
    if raw.get("is_encoder_decoder"):
        raise UnsupportedModel(f"{name} is a {model_type} with an encoder and a decoder, not a causal language model")
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if causal is None and model_type in MODEL_MAPPING_NAMES and not any(_causal_like(model_type)):
        raise UnsupportedModel(f"{name} is a {model_type}, which is not a causal language model")
    if causal is None:
        return  # a model that sees, or a type transformers does not know: adapters and --trust-remote-code decide
    fitting = {causal, MODEL_MAPPING_NAMES.get(model_type), *_causal_like(model_type)}
    architectures = raw.get("architectures") or [causal]
    if not isinstance(architectures, list) or not all(isinstance(one, str) for one in architectures):
        raise BadCheckpoint(f"the config.json of {name} states architectures {shown(architectures)}; expected names")
    if "auto_map" not in raw and not fitting.intersection(architectures):
        raise UnsupportedModel(
            f"{name} is a {architectures[0]}; expected {causal}, the causal language model of type {model_type!r}"
        )


def _causal_like(model_type: str) -> tuple[str | None, ...]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type),)


@contextmanager
def _silent() -> Iterator[None]:
    """What transformers would log of token ids and vocabularies is reported here, where it matters, in one line."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
