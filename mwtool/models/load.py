"""A whole model in memory with the places of its FFNs: what ablation, fine-tuning and evaluation work on."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from logging import Filter, LogRecord
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from mwtool.architecture.layout import FFN, DecoderLayer
from mwtool.architecture.registry import adapter_for
from mwtool.architecture.validate import decoder_layers, ffn_at
from mwtool.errors import BadCheckpoint, UnsupportedModel, line_of
from mwtool.massive import Identity, MassiveWeights
from mwtool.models.checkpoint import open_checkpoint
from mwtool.models.identity import identity_of
from mwtool.models.load_options import On
from mwtool.models.quantization import refuse_unscaled_weights
from mwtool.models.source import ADAPTER_FILES, Source, locate, model_class, unusable

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model ready to run.

    model: what to call; a PeftModel where an adapter is kept apart from the pre-trained weights.
    base: the module whose parameters `layers` names; the same object as `model` without PEFT.
    on: where attacks act on an adapter folder's model, `base` (pre-trained weights under the
        adapter) or `merged` (the sum of both); None without an adapter.
    """

    model: PreTrainedModel | PeftModel
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    source: Source
    layers: tuple[DecoderLayer, ...]
    on: On | None = None
    notes: tuple[str, ...] = ()

    @property
    def identity(self) -> Identity:
        """Name and shape, to be compared with those of a saved scan."""
        return identity_of(self.source.name, self.source.revision, self.base.config, self.layers, self.base)

    def ffn(self, massive: MassiveWeights) -> FFN:
        """The feed-forward network that holds these rows; raises BadValue where there is none."""
        return ffn_at(self.layers, massive.layer, massive.expert)


def load(
    model: str,
    *,
    on: On = "base",
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    device_map: str | None = None,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    model_options: dict[str, Any] | None = None,
) -> Loaded:
    """Load a Hub id, a folder, a PEFT adapter folder, a GGUF file or `demo` whole, in evaluation mode.

    dtype: ``auto`` (as stored; bfloat16 for quantized GGUF) or a torch dtype's name. device_map: ``auto`` spreads over
    devices (accelerate). gguf_file: which GGUF file of a folder or Hub repository that holds several.
    model_options: further arguments of `from_pretrained`, such as a quantization_config.
    Raises MwtoolError where it cannot be opened, a weight is absent or misshapen, or no device has room for its
    embedding; UnsupportedModel for a GGUF file whose positions would be computed wrongly.
    """
    source = locate(model, revision, trust_remote_code=trust_remote_code, gguf_file=gguf_file)
    config = source.config()
    layers = tuple(decoder_layers(adapter_for(config.model_type), config))
    options = {"dtype": dtype, "device_map": device_map or {"": device}, **(model_options or {})}
    base = _from_pretrained(source, config, options)
    tokenizer = source.tokenizer()
    if source.adapter is None:
        unused = (f"--on {on} is ignored: {source.name} is no adapter folder",) if on != "base" else ()
        return Loaded(
            model=base, base=base, tokenizer=tokenizer, source=source, layers=layers, notes=(*source.notes, *unused)
        )
    wrapped: Any = _with_adapter(base, source.adapter)
    if on == "merged":
        merged = wrapped.merge_and_unload().eval()
        return Loaded(
            model=merged, base=merged, tokenizer=tokenizer, source=source, layers=layers, on=on, notes=source.notes
        )
    return Loaded(
        model=wrapped,
        base=wrapped.get_base_model(),
        tokenizer=tokenizer,
        source=source,
        layers=layers,
        on=on,
        notes=source.notes,
    )


def _from_pretrained(source: Source, config: Any, options: dict[str, Any]) -> PreTrainedModel:
    from safetensors import SafetensorError

    faults: tuple[type[Exception], ...] = (*unusable(), IndexError, UnpicklingError, SafetensorError)
    stored_plain = getattr(config, "quantization_config", None) is None
    try:
        with _quiet():
            model, info = _filled(source, config, options) if source.gguf else _read(source, config, options)
    except ImportError as fault:  # a quantization library that is not installed
        raise UnsupportedModel(f"{source.name} cannot be loaded here: {line_of(fault)}") from fault
    except faults as fault:
        _blame_file(source)
        raise BadCheckpoint(f"{source.name} cannot be loaded: {line_of(fault)}") from fault
    _check_whole(source, info)
    if stored_plain and not source.gguf:  # transformers casts whatever it finds, without a word
        refuse_unscaled_weights(model, open_checkpoint(source))
    if model.get_input_embeddings().weight.is_meta:
        raise UnsupportedModel(
            f"{source.name} does not fit: even its embedding is offloaded to disk; give it more memory"
        )
    evaluated: PreTrainedModel = model.eval()
    return evaluated


def _read(source: Source, config: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model as `from_pretrained` reads it, and what it says of absent and misshapen tensors."""
    loaded: tuple[Any, dict[str, Any]] = model_class(config).from_pretrained(
        source.folder if source.repo is None else source.repo,
        config=config,
        revision=source.revision or "main",
        trust_remote_code=source.trust_remote_code,
        local_files_only=source.repo is None,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # said below, by name
        **options,
    )
    return loaded


def _filled(source: Source, config: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The same of a GGUF file, whose tensors are given to `from_pretrained` as they are dequantized, one by one.

    Its own way of reading GGUF depends on the version: 5.17 gets Gemma 3 wrong, 5.23 does not read Q5_0.
    """
    assert source.gguf is not None
    source.gguf.refuse_rotary_fault()
    checkpoint = open_checkpoint(source)
    kind = model_class(config)._model_mapping[type(config)]  # noqa: SLF001 - the automatic class insists on a path
    with checkpoint.tensors(checkpoint.files) as tensors:
        loaded: tuple[Any, dict[str, Any]] = kind.from_pretrained(
            None, config=config, state_dict=tensors, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    loaded[0].name_or_path = loaded[0].config.name_or_path = source.reference  # PEFT writes it down as the base model
    return loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of absent and misshapen tensors, and its progress bar but on a terminal."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    logger = logging.get_logger("transformers.modeling_utils")
    silence = _NoReport()
    logger.addFilter(silence)
    try:
        yield
    finally:
        logger.removeFilter(silence)


def _check_whole(source: Source, info: dict[str, Any]) -> None:
    """Raise BadCheckpoint for what transformers fills with random numbers and goes on."""
    absent = sorted(info["missing_keys"])
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise BadCheckpoint(f"{source.name} lacks tensor {absent[0]}{more}; it is incomplete")
    misshapen = sorted(info["mismatched_keys"])
    if misshapen:
        name, found, expected = misshapen[0]
        where = "config.json" if source.gguf is None else "its metadata"
        raise BadCheckpoint(
            f"tensor {name} of {source.name} has shape {tuple(found)}; {where} makes it {tuple(expected)}"
        )


def _blame_file(source: Source) -> None:
    """Raise BadCheckpoint, naming the file, if loading failed for one that is absent or damaged."""
    checkpoint = open_checkpoint(source)
    for name in {file: name for name, file in checkpoint.files.items()}.values():  # one tensor of each file
        with checkpoint.tensors([name]):
            pass


class _NoReport(Filter):
    """transformers logs a table of absent and misshapen tensors, the first of which is said here in one line."""

    def filter(self, record: LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()


def _with_adapter(base: PreTrainedModel, adapter: str) -> PeftModel:
    from peft import PeftConfig, PeftModel
    from safetensors import SafetensorError

    if not any((Path(adapter) / file).exists() for file in ADAPTER_FILES):
        raise BadCheckpoint(f"the adapter {adapter} has no weights; expected {' or '.join(ADAPTER_FILES)}")
    if "disk" in getattr(base, "hf_device_map", {}).values():
        raise UnsupportedModel(
            f"the base model of {adapter} does not fit and is left in its files in part, over which PEFT would write "
            f"the sum with the adapter; give it more memory, or merge and save the two with PEFT and take that"
        )
    try:
        config = PeftConfig.from_pretrained(adapter)
        if config.is_prompt_learning:
            raise UnsupportedModel(
                f"the adapter {adapter} is {config.peft_type.value}, which puts virtual tokens where bos should be "
                f"first; expected an adapter of weights, such as LoRA"
            )
        with warnings.catch_warnings():  # peft asks transformers by a former name
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            return PeftModel.from_pretrained(base, adapter).eval()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as fault:
        raise BadCheckpoint(f"the adapter {adapter} cannot be applied: {line_of(fault)}") from fault
