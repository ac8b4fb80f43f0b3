"""What MODEL means: a Hub id, a local folder, a PEFT adapter folder, a GGUF file, or `demo`.

Everything is turned into a local folder with at least the small files (configuration,
tokenizer, weight index). Weight files of a Hub repository are fetched when they are
first read, so that a scan that stops at layer 6 does not download layer 79.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mwtool.architecture.registry import register
from mwtool.errors import BadCheckpoint, ModelNotFound, UnsupportedModel, line_of
from mwtool.files.text import link_fault, read_json, shown
from mwtool.models.gguf_header import is_gguf
from mwtool.models.gguf_model import GGUFModel, Vocabulary, models_among, open_gguf
from mwtool.models.hub import fetch, fetch_small, files_of
from mwtool.models.load_options import Download
from mwtool.models.weight_files import find_weights, present

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


def locate(
    model: str, revision: str | None = None, *, trust_remote_code: bool = False, gguf_file: str | None = None
) -> Source:
    """Find MODEL and fetch its small files.

    gguf_file: which GGUF file of a folder or Hub repository to take; it may be left out where there is one.
    Raises ModelNotFound, naming what was looked for and where, and what `open_gguf` raises.
    """
    return _follow_adapter(replace(_find(model, revision, gguf_file), trust_remote_code=trust_remote_code))


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


def _find(model: str, revision: str | None, gguf_file: str | None = None) -> Source:
    if model == "demo":
        return Source(name="demo", folder=DEMO)
    try:
        path = Path(model).expanduser()
    except RuntimeError:  # ~name, and nobody of that name
        raise ModelNotFound(f"no such folder: {model}") from None
    if lost := link_fault(path):
        raise ModelNotFound(lost)
    if path.is_file():
        if not is_gguf(path):
            raise ModelNotFound(f"{model} is a file; expected a GGUF file or a folder with config.json and the weights")
        source = Source(name=model, folder=path.parent, gguf=open_gguf(path))
    elif model and path.is_dir():
        source = _local(model, path, gguf_file)
    else:
        source = _hub(model, revision, gguf_file)
    if revision is not None and source.repo is None:
        return _noted(source, f"--revision {revision} is ignored: {model} is local")
    return source


def _local(model: str, folder: Path, gguf_file: str | None) -> Source:
    for name in ("config.json", ADAPTER_CONFIG, *ADAPTER_FILES, *TOKENIZER_FILES, *OTHER_FILES):
        present(folder, name)  # a link that leads nowhere is not the same as no file
    has_config = (folder / "config.json").exists() or (folder / ADAPTER_CONFIG).exists()
    if gguf_file is None and has_config and any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        return Source(name=model, folder=folder)
    chosen = _chosen(model, [path.name for path in folder.glob("*.gguf")], gguf_file)
    if chosen is not None:
        return Source(name=str(Path(model) / chosen), folder=folder, gguf=open_gguf(folder / chosen))
    if has_config:
        return Source(name=model, folder=folder)
    sibling = folder.resolve().parent / f"{folder.resolve().name}-hf"
    if _original_format(folder) and (sibling / "config.json").exists():
        return Source(name=str(sibling), folder=sibling, notes=(f"{model} is in the original format; using {sibling}",))
    what = "it is in the original format, convert it or use its -hf version"
    raise ModelNotFound(
        f"{model} has no config.json; "
        f"{what if _original_format(folder) else 'expected a model in Hugging Face format or a GGUF file'}"
    )


def _chosen(model: str, names: list[str], wanted: str | None) -> str | None:
    """Of the GGUF files of a folder or repository the one to open; None where there is none and none was asked for.

    Raises ModelNotFound where the one asked for is absent, or several models are there and none was asked for.
    """
    models = models_among(names)
    if wanted is not None:
        if wanted not in names:
            there = f"its GGUF files are {', '.join(models)}" if models else "it has no GGUF file"
            raise ModelNotFound(f"{model} has no {wanted}; {there}")
        return wanted
    if len(models) > 1:
        raise ModelNotFound(f"{model} has {len(models)} GGUF models; say which with --gguf-file: {', '.join(models)}")
    return models[0] if models else None


def _original_format(folder: Path) -> bool:
    return (folder / "params.json").exists() or any(folder.glob("consolidated.*"))


def _hub(model: str, revision: str | None, gguf_file: str | None) -> Source:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if model.startswith((".", "/", "~")) or model.count("/") > 1 or model.endswith(".gguf"):
        raise ModelNotFound(f"no such {'file' if model.endswith('.gguf') else 'folder'}: {model}")
    try:
        validate_repo_id(model)
    except HFValidationError as fault:
        raise ModelNotFound(f"{model!r} is neither a folder nor a Hub id: {line_of(fault)}") from None
    source = _snapshot(model, revision)
    has_config = (source.folder / "config.json").exists() or (source.folder / ADAPTER_CONFIG).exists()
    if has_config and gguf_file is None:
        return source
    name = _chosen(model, files_of(model, source.revision, source.folder), gguf_file)
    if name is not None:
        return _fetched(source, name)
    try:
        sibling = _snapshot(f"{model}-hf", revision)
    except ModelNotFound:
        sibling = None
    if sibling is None or not (sibling.folder / "config.json").exists():
        raise ModelNotFound(
            f"{model} has no config.json, and there is no {model}-hf; expected Hugging Face format or a GGUF file"
        )
    return _noted(sibling, f"{model} is in the original format; using {model}-hf")


def _fetched(source: Source, name: str) -> Source:
    """A repository's GGUF file, fetched whole: its tensors lie in no order that a part of it would serve."""
    path = source.path(name)
    if path is None:
        raise ModelNotFound(f"{source.name} lists {name} and does not give it; get it again")
    folder = Path(name).parent
    return replace(source, gguf=open_gguf(path, lambda part: source.path(str(folder / part))))


def _snapshot(repo: str, revision: str | None) -> Source:
    folder = fetch_small(repo, revision, SMALL_FILES)
    return Source(name=repo, folder=folder, repo=repo, revision=folder.name)


def _follow_adapter(source: Source) -> Source:
    """A PEFT adapter's folder stands for its base model; a whole model with an adapter's files beside it for itself."""
    if _whole(source):
        return _leaving_adapter(source)
    base = read_json(source.folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise BadCheckpoint(f"{source.folder / ADAPTER_CONFIG} names no base_model_name_or_path")
    try:
        found = _find(base, None)
    except ModelNotFound as fault:
        raise ModelNotFound(f"{source.name} is a PEFT adapter whose base model cannot be opened: {fault}") from fault
    if not _whole(found):
        raise BadCheckpoint(
            f"{source.name} is a PEFT adapter whose base model {base} is an adapter too; merge that one"
        )
    # Noted by whoever leaves the adapter out: a scan does, an evaluation does not.
    return replace(_leaving_adapter(found), adapter=str(source.folder), trust_remote_code=source.trust_remote_code)


def _whole(source: Source) -> bool:
    """Whether a folder is a model's, and not an adapter's beside which the base's configuration may lie."""
    if source.gguf is not None or not (source.folder / ADAPTER_CONFIG).exists():
        return True
    return (source.folder / "config.json").exists() and find_weights(source) is not None


def _leaving_adapter(source: Source) -> Source:
    """The same, with a note where an adapter's files lie beside a whole model."""
    files = [name for name in (ADAPTER_CONFIG, *ADAPTER_FILES) if (source.folder / name).exists()]
    if source.gguf is not None or ADAPTER_CONFIG not in files:
        return source
    return _noted(
        source,
        f"{source.name} is a whole model with the files of a PEFT adapter beside it ({', '.join(files)}); the model is "
        f"used without the adapter",
    )


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


def _noted(source: Source, note: str) -> Source:
    return replace(source, notes=(*source.notes, note))


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
