"""Find what MODEL names: a Hub id, a local folder, a PEFT adapter folder, a GGUF file, or `demo`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mwtool.errors import BadCheckpoint, ModelNotFound, line_of
from mwtool.files.text import link_fault, read_json
from mwtool.models.gguf_header import is_gguf
from mwtool.models.gguf_model import models_among, open_gguf
from mwtool.models.hub import fetch_small, files_of
from mwtool.models.source import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    DEMO,
    OTHER_FILES,
    SMALL_FILES,
    TOKENIZER_FILES,
    WEIGHTS,
    Source,
)
from mwtool.models.weight_files import find_weights, present


def locate(
    model: str, revision: str | None = None, *, trust_remote_code: bool = False, gguf_file: str | None = None
) -> Source:
    """Find MODEL and fetch its small files.

    gguf_file: which GGUF file of a folder or Hub repository to take; it may be left out where there is one.
    Raises ModelNotFound, naming what was looked for and where, and what `open_gguf` raises.
    """
    return _follow_adapter(replace(_find(model, revision, gguf_file), trust_remote_code=trust_remote_code))


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


def _noted(source: Source, note: str) -> Source:
    return replace(source, notes=(*source.notes, note))
