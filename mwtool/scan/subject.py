"""What a scan runs: a model in memory, or one whose weights are read from its files a decoder layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from mwtool.architecture.layout import FFN, Adapter, DecoderLayer
from mwtool.architecture.packed import packed_dtype
from mwtool.architecture.registry import adapter_for
from mwtool.architecture.validate import check_fit, decoder_layers, unwrapped
from mwtool.errors import BadPlugin, UnsupportedModel
from mwtool.models.bos import Bos, find_bos
from mwtool.models.load_options import On
from mwtool.models.source import Source
from mwtool.models.streaming import Stream, open_stream
from mwtool.scan.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model ready to run.

    stream: where its weights come from disk. adapter: to be named if it proves wrong.
    tokenizer: of a model in memory, as given; of one that is streamed, `source` has it.
    """

    model: PreTrainedModel
    layers: list[DecoderLayer]
    bos: Bos
    name: str
    adapter: str
    revision: str | None = None
    notes: tuple[str, ...] = ()
    stream: Stream | None = None
    source: Source | None = None
    given: PreTrainedTokenizerBase | None = None

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        if self.stream is not None:
            return self.stream.device
        return next((p.device for p in self.model.parameters() if not p.is_meta), torch.device("cpu"))

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once, without those of a PEFT adapter."""
        if self.stream is not None:
            return self.stream.parameters
        tuners = [getattr(m, name) for m in self.model.modules() for name in getattr(m, "adapter_layer_names", ())]
        added: int = sum(p.numel() for tuner in tuners for p in tuner.parameters())
        return self.model.num_parameters() - added

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """What turns a text into tokens; None where there is nothing. Of a GGUF file this takes a while to build."""
        return self.given if self.source is None else self.source.tokenizer()

    @contextmanager
    def running(self, walked: int | None = None) -> Iterator[PreTrainedModel]:
        """The model, ready for forwards. Raises BadPlugin, naming the adapter, where it proves wrong.

        walked: how many layers they run; None for all.
        """
        try:
            if self.stream is None:
                yield self.model
            else:
                with self.stream.flowing(walked) as model:
                    yield model
        except BadPlugin as fault:
            if str(fault).startswith(self.adapter):  # already named: one of its own callables failed
                raise
            raise BadPlugin(f"{self.adapter} does not describe {type(self.model).__name__}: {fault}") from fault


def streamed(source: Source, settings: Settings, dtype: str = "auto", device: str = "cpu", on: On = "base") -> Subject:
    """A located model, without weights until it runs. dtype, device, on: as for `scan_checkpoint`.

    Raises MwtoolError, saying what was found and expected.
    """
    config = source.config()
    adapter = adapter_for(config.model_type)
    layers = decoder_layers(adapter, config)
    bos = find_bos(settings.bos, source.vocabulary(), config, settings.prompt)
    stream = open_stream(source, config, layers, dtype, device, on=on, check=partial(check_fit, adapter, layers))
    notes = (*source.notes, *stream.checkpoint.notes)
    if said := _of_adapter(source, on):
        notes = (*notes, said)
    return Subject(
        model=stream.model,
        layers=layers,
        bos=bos,
        name=source.name,
        adapter=str(adapter),
        revision=source.revision,
        notes=notes,
        stream=stream,
        source=source,
    )


def _of_adapter(source: Source, on: On) -> str | None:
    if source.adapter is None:
        return f"--on merged is ignored: {source.name} is no adapter folder" if on == "merged" else None
    if on == "merged":
        return f"the PEFT adapter was merged into its base model {source.name} as its weights were read"
    return (
        f"{source.adapter} is a PEFT adapter; its base model {source.name} was scanned, without the adapter "
        f"(--on merged scans the sum)"
    )


def in_memory(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: Settings,
    adapter: Adapter | None = None,
) -> Subject:
    """A model in memory, wrapped by PEFT or not. adapter: where its matrices are; by default the one installed.

    Raises UnsupportedModel where weights are packed or offloaded, so that rows cannot be read.
    """
    base = unwrapped(model)
    adapter = adapter or adapter_for(base.config.model_type)
    layers = decoder_layers(adapter, base.config)
    check_fit(adapter, layers, base)
    name: str = base.config.name_or_path or type(base).__name__
    _check_readable(name, layers, base)
    bos = find_bos(settings.bos, tokenizer, base.config, settings.prompt)
    return Subject(model=base, layers=layers, bos=bos, name=name, adapter=str(adapter), given=tokenizer)


def kinds(layers: Sequence[DecoderLayer]) -> list[FFN]:
    """One FFN of each kind a layer has: a routed expert stands for all."""
    return [ffn for layer in layers for ffn in layer.ffns if not ffn.expert]


def _check_readable(name: str, layers: Sequence[DecoderLayer], model: PreTrainedModel) -> None:
    for index, layer in enumerate(layers):
        for ffn in kinds([layer]):
            packed = packed_dtype(model, ffn.down)
            how = "offloaded" if ffn.down.read(model).is_meta else packed and f"quantized (packed {packed})"
            if how:
                raise UnsupportedModel(
                    f"{name} is {how} in layer {index} and cannot be scanned in memory; scan the checkpoint it was "
                    f"made of"
                )
