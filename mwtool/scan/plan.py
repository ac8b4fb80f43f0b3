"""What a scan will read: layers, tensors and bytes, from the headers of a checkpoint's files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mwtool.errors import UnsupportedModel
from mwtool.models.fetching import stored_bytes
from mwtool.models.locate import locate
from mwtool.scan.scanner import check
from mwtool.scan.settings import Settings
from mwtool.scan.subject import Subject, streamed
from mwtool.scan.unread import Unread, unread

if TYPE_CHECKING:
    from mwtool.architecture.layout import DecoderLayer
    from mwtool.models.streaming import Stream


@dataclass(frozen=True, slots=True)
class Part:
    """One decoder layer, or what the model has before the first. tensors: how many are read; size: their bytes."""

    name: str
    tensors: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanPlan:
    """What a scan of a checkpoint will read, as it is stored.

    parts: what comes before the layers, then each layer walked. layers: how many the model has. experts: how many
    routed experts are counted a layer, one token's; None for a dense model. files: the files these tensors are in.
    cached: whether these files are on this machine. whole: bytes of these files' tensors. unread: what a single
    position does without, which is not among the parts; spared: its bytes. computed: bytes that the weights of the
    largest layer have in `dtype`, the precision of the scan, with zeros for what is not read; as_stored: whether that
    is how they lie in the files, so that they need not be copied.
    """

    model: str
    revision: str | None
    model_type: str
    dtype: str
    parts: tuple[Part, ...]
    layers: int
    experts: int | None
    files: int
    cached: bool
    whole: int
    unread: tuple[Unread, ...]
    spared: int
    computed: int
    as_stored: bool

    @property
    def size(self) -> int:
        """Bytes to be read."""
        return sum(part.size for part in self.parts)

    @property
    def largest(self) -> int:
        """Bytes of the largest part: the weights in memory at a time, if they are computed with as they are stored."""
        return max(part.size for part in self.parts)


def plan_scan(
    model: str,
    settings: Settings | None = None,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
) -> ScanPlan:
    """Plan a scan of bos: of a model on the Hub only the small files and the headers of the others are fetched.

    dtype: as in `scan_checkpoint`.

    Raises UnsupportedModel for GGUF and ``.bin`` files, which have no such headers, and what `scan_checkpoint` raises
    over a model that it cannot open.
    """
    settings = settings or Settings()
    found = locate(model, revision, trust_remote_code=trust_remote_code, gguf_file=gguf_file)
    if found.gguf is not None:
        raise UnsupportedModel(f"{found.name} is a GGUF file; --dry-run reads the headers of safetensors files only")
    subject = streamed(replace(found, download="ranges"), settings, dtype)
    check(settings, subject)
    stream = subject.stream
    assert stream is not None
    if stream.checkpoint.legacy is not None:
        raise UnsupportedModel(f"{found.name} has .bin files; --dry-run reads the headers of safetensors files only")
    stream.leave_out()
    walked = subject.layers if settings.last_layer is None else subject.layers[: settings.last_layer + 1]
    experts = _experts_of_a_token(subject) if stream.experts else None
    reads = {"before the layers": _before(stream)}
    for index, layer in enumerate(walked):
        reads[f"layer {index}"] = dict.fromkeys(stream.tensors_of(layer.path))
        if layer.experts is not None and layer.experts.module in stream.experts:
            held = stream.experts[layer.experts.module]
            used = held.count if experts is None else min(experts, held.count)
            reads[f"layer {index}"] |= held.of(range(used))
    computed = _computed(stream, walked, experts)
    stored = {
        name: {**reads[name], **dict.fromkeys(stream.names_left_out(layer.path))}
        for name, layer in zip(list(reads)[1:], walked, strict=True)
    }
    largest = max(_size(stream, part) for part in stored.values())
    files = {stream.checkpoint.files[name] for part in reads.values() for name in part}
    return ScanPlan(
        model=found.name,
        revision=found.revision,
        model_type=subject.model.config.model_type,
        dtype=str(subject.model.dtype).removeprefix("torch."),
        parts=tuple(Part(name, len(part), _size(stream, part)) for name, part in reads.items()),
        layers=len(subject.layers),
        experts=experts,
        files=len(files),
        cached=all((found.folder / file).exists() for file in files),
        whole=_size(stream, {name: None for name, file in stream.checkpoint.files.items() if file in files}),
        unread=unread(stream, walked),
        spared=_size(stream, {name: None for layer in walked for name in stream.names_left_out(layer.path)}),
        computed=computed,
        as_stored=computed == largest,
    )


def _computed(stream: Stream, walked: Sequence[DecoderLayer], experts: int | None) -> int:
    """Bytes of the largest layer in the precision of the scan, with the experts of one token."""
    sizes = []
    for layer in walked:
        size = 0
        for name, weight in stream.model.get_submodule(layer.path).named_parameters(prefix=layer.path):
            held = next((one for path, one in stream.experts.items() if name.startswith(f"{path}.")), None)
            part = 1.0 if held is None or experts is None else min(experts, held.count) / held.count
            size += round(part * weight.numel() * weight.element_size())
        sizes.append(size)
    return max(sizes)


def _experts_of_a_token(subject: Subject) -> int | None:
    """To how many routed experts a token goes; None where the configuration does not say."""
    stated = getattr(subject.model.config.get_text_config(), "num_experts_per_tok", None)
    return stated if isinstance(stated, int) and stated > 0 else None


def _before(stream: Stream) -> dict[str, list[int] | None]:
    """Tensors of what runs before the first layer -> the rows read, None for all: of an embedding it is one."""
    from torch import nn

    first = stream.layers[0].path
    beside = first.rpartition(".")[0].rpartition(".")[0]  # model.layers.0 -> model
    found: dict[str, list[int] | None] = {}
    for name, module in stream.model.get_submodule(beside).named_modules(prefix=beside):
        if name == first:
            break
        for weight, _ in module.named_parameters(prefix=name, recurse=False):
            rows = [0] if isinstance(module, nn.Embedding) else None
            found |= dict.fromkeys(stream.names.get(weight, []), rows)
    return found


def _size(stream: Stream, reads: Mapping[str, list[int] | None]) -> int:
    """Bytes of these tensors, or of these entries along their first dimension, as they are stored."""
    with stream.checkpoint.tensors(reads) as tensors:
        return sum(stored_bytes(tensors[name], rows) for name, rows in reads.items())
