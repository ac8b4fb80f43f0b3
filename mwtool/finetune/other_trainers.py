"""MacDrop in trainers that are configured and not programmed: its settings, and the callback that they give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from mwtool.files.scan_schema import ScanDocument
from mwtool.files.schema import read_document
from mwtool.macdrop.callback import MacDropCallback
from mwtool.macdrop.curriculum_yaml import read_curriculum
from mwtool.massive import SCHEMA, Identity, MassiveWeights, load_massive
from mwtool.scan.scanner import scan_checkpoint
from mwtool.scan.settings import Settings

if TYPE_CHECKING:
    from mwtool.macdrop.curriculum import Curriculum


class MacDropOptions(BaseModel):
    """What a trainer's configuration says of MacDrop.

    schedule: such as `step:0.8`, or a curriculum's YAML file. k, scope, resample, seed: as `mwtool finetune` has them;
    None: what the curriculum says. massive: a saved scan of the model; None: its checkpoint is scanned.
    """

    model_config = ConfigDict(extra="forbid")

    schedule: str = "step:0.8"
    k: int | None = Field(default=None, ge=1)
    scope: Literal["massive", "others", "all"] | None = None
    resample: Literal["step", "microbatch"] | None = None
    seed: int | None = Field(default=None, ge=0)
    massive: Path | None = None

    def curriculum(self) -> Curriculum:
        """The curriculum that they describe. Raises BadSyntax and BadValue as `read_curriculum` does."""
        read = read_curriculum(self.schedule)
        changes = {name: getattr(self, name) for name in ("k", "scope", "resample", "seed")}
        return replace(read, **{name: value for name, value in changes.items() if value is not None})


def macdrop_callback(
    model: str, options: MacDropOptions, *, revision: str | None = None, trust_remote_code: bool = False
) -> MacDropCallback:
    """The callback for a trainer of this model.

    Args:
        model: the model that is trained, a Hub id or a folder. Its files are scanned, one layer in memory at a time, so
            that it does not matter how the trainer loads, quantizes or shards it.
        options: the settings of MacDrop.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run Python code that comes with the checkpoint.

    Returns:
        A callback to add to the trainer, once.

    Raises:
        BadValue: the model has no massive weights, or the saved scan is another shape's.

    """
    curriculum = options.curriculum()
    if options.massive is None:
        scan = scan_checkpoint(model, Settings(k=curriculum.k), revision=revision, trust_remote_code=trust_remote_code)
        return MacDropCallback(scan.massive, curriculum)
    return MacDropCallback(_saved(options.massive), curriculum)


def _saved(path: Path) -> MassiveWeights | None:
    """The rows of a saved scan; MacDrop refuses those that the model does not have when training begins."""
    _, found = read_document(path, {SCHEMA: ScanDocument}, "mwtool scan -o")
    shape = found.shape.model_dump()
    identity = Identity(model=found.model, revision=found.revision, model_type=found.model_type, **shape)
    return load_massive(path, identity).massive
