"""A whole model in memory with the places of its FFNs: what ablation, fine-tuning and evaluation work on."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from logging import Filter, LogRecord
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from mwtool.architecture.layout import FFN, DecoderLayer
from mwtool.architecture.registry import adapter_for
from mwtool.architecture.validate import decoder_layers, ffn_at
from mwtool.errors import BadCheckpoint, UnsupportedModel, line_of
from mwtool.files.text import read_json
from mwtool.massive import Identity, MassiveWeights
from mwtool.models.checkpoint import WHOLE, Checkpoint, open_checkpoint
from mwtool.models.identity import identity_of
from mwtool.models.key_mapping import absent
from mwtool.models.load_options import On
from mwtool.models.locate import locate
from mwtool.models.meta_model import empty_model, resolved_dtype
from mwtool.models.peft_adapter import tokenizer_beside, with_adapter
from mwtool.models.quantization import (
    NO_ROOM,
    refuse_fp8_fault,
    refuse_packed_away,
    refuse_unpacked,
    refuse_unscaled_weights,
)
from mwtool.models.source import Source, unusable

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
    base, stored = _from_pretrained(source, config, options)
    tokenizer = source.tokenizer()
    if source.adapter is not None:
        tokenizer, said = tokenizer_beside(source, tokenizer, base)
        stored += said
    if source.adapter is None:
        unused = (f"--on {on} is ignored: {source.name} is no adapter folder",) if on != "base" else ()
        return Loaded(
            model=base,
            base=base,
            tokenizer=tokenizer,
            source=source,
            layers=layers,
            notes=(*source.notes, *stored, *unused),
        )
    whole, below = with_adapter(base, source.adapter, on)
    return Loaded(
        model=whole,
        base=below,
        tokenizer=tokenizer,
        source=source,
        layers=layers,
        on=on,
        notes=(*source.notes, *stored),
    )


def _from_pretrained(source: Source, config: Any, options: dict[str, Any]) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model with its weights, and what the user should know about its files."""
    from safetensors import SafetensorError

    checkpoint = open_checkpoint(source)
    refuse_fp8_fault(source, config)
    refuse_unpacked(checkpoint, config)
    faults: tuple[type[Exception], ...] = (*unusable(), UnpicklingError, SafetensorError)
    stored_plain = getattr(config, "quantization_config", None) is None
    try:
        with _quiet():
            model, info = _filled(source, config, checkpoint, options)
    except ImportError as fault:  # a quantization library that is not installed
        raise UnsupportedModel(f"{source.name} cannot be loaded here: {line_of(fault)}") from fault
    except faults as fault:
        if isinstance(fault, ValueError) and not stored_plain and len(set(_places(options["device_map"]))) > 1:
            raise UnsupportedModel(
                f"{source.name} is quantized and cannot be spread like this: {line_of(fault)}; {NO_ROOM}"
            ) from fault
        raise BadCheckpoint(f"{source.name} cannot be loaded: {line_of(fault)}") from fault
    _check_whole(source, checkpoint, info)
    if stored_plain and not source.gguf:  # transformers casts whatever it finds, without a word
        refuse_unscaled_weights(model, checkpoint)
    refuse_packed_away(source.name, model)
    if model.get_input_embeddings().weight.is_meta:
        raise UnsupportedModel(
            f"{source.name} does not fit: even its embedding is offloaded to disk; give it more memory"
        )
    evaluated: PreTrainedModel = model.eval()
    return evaluated, tuple(note for note in checkpoint.notes if note != WHOLE)


def _filled(source: Source, config: Any, checkpoint: Checkpoint, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model, and what transformers says of absent and misshapen tensors.

    transformers is given the tensors of the checkpoint, as a scan reads them, and not the folder: by itself it takes a
    tensor that lies in two shards from the last of them, whatever the index says, and applies an adapter it finds.
    Only where layers may be left on the disk does it have to know the files, since it reads from them later.
    """
    empty = empty_model(source, config)
    kind: Any = type(empty)
    if not isinstance(config, kind.config_class):  # the text model of one that sees
        config = empty.config
    options = {**options, "dtype": resolved_dtype(options["dtype"], config, checkpoint)}
    common = {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True, **options}  # said by name
    place = str(source.folder if source.repo is None else source.repo)
    plain = checkpoint.legacy is None and source.gguf is None and checkpoint.as_transformers
    if source.gguf is not None:
        source.gguf.refuse_rotary_fault()
        place = source.reference
    with checkpoint.whole() as tensors:
        if plain and len(set(_places(options["device_map"]))) > 1:
            root, files = _where(source)
            model, info = kind.from_pretrained(root, **files, **common)
        else:
            model, info = kind.from_pretrained(None, state_dict=tensors, **common)
            if model.can_generate() and source.gguf is None:
                model.generation_config = _generation(source)
    model.config.name_or_path = model.name_or_path = place  # which PEFT writes down as the base model
    return model, info


def _where(source: Source) -> tuple[str, dict[str, Any]]:
    """What transformers is told of a model's files so that it finds them and no adapter, whatever lies beside them.

    Up to 5.19 it looks for an adapter in the local folder that it is given, not in the subfolder: so that is the root.
    """
    elsewhere = {"adapter_kwargs": {"subfolder": "no adapter"}}
    if source.repo is not None:
        return source.repo, {"revision": source.revision or "main", **elsewhere}
    folder = source.folder.absolute()
    inside = str(folder.relative_to(folder.anchor))
    return folder.anchor, {"subfolder": inside, "local_files_only": True, **elsewhere}


def _places(device_map: Any) -> tuple[Any, ...]:
    """Where a device map puts modules; more than one for those that accelerate works out itself."""
    return tuple(device_map.values()) if isinstance(device_map, dict) else ("here", "elsewhere")


def _generation(source: Source) -> Any:
    """How the model generates: as generation_config.json says, else as config.json does."""
    from transformers import GenerationConfig

    if (source.folder / "generation_config.json").exists():
        read_json(source.folder / "generation_config.json")
        return GenerationConfig.from_pretrained(source.folder)
    return GenerationConfig.from_pretrained(source.folder, config_file_name="config.json", _from_model_config=True)


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
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors", UserWarning)  # refused by its shape
            yield
    finally:
        logger.removeFilter(silence)


def _check_whole(source: Source, checkpoint: Checkpoint, info: dict[str, Any]) -> None:
    """Raise BadCheckpoint for what transformers fills with random numbers without failing."""
    missing = sorted(info["missing_keys"], key=_natural)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BadCheckpoint(f"{source.name} {absent(missing[0], checkpoint, more)}")
    misshapen = sorted(info["mismatched_keys"])
    if misshapen:
        name, found, expected = misshapen[0]
        where = "config.json" if source.gguf is None else "its metadata"
        raise BadCheckpoint(
            f"tensor {name} of {source.name} has shape {tuple(found)}; {where} makes it {tuple(expected)}"
        )


def _natural(name: str) -> list[str | int]:
    """Layer 2 before layer 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


class _NoReport(Filter):
    """transformers logs a table of absent and misshapen tensors, the first of which is reported here in one line."""

    def filter(self, record: LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()
