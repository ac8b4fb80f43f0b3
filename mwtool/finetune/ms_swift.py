"""MacDrop in ms-swift: a file for `--external_plugins` calls `register`, and `--callbacks macdrop` uses it.

Tested with ms-swift 4.6. This module imports swift, and nothing else of mwtool imports this module.
"""

from __future__ import annotations

from typing import Any

from swift.callbacks import callbacks_map

from mwtool.finetune.other_trainers import MacDropOptions, macdrop_callback
from mwtool.macdrop.callback import MacDropCallback


def register(schedule: str = "step:0.8", *, name: str = "macdrop", **options: Any) -> None:
    """Make `--callbacks macdrop` known to ms-swift.

    Args:
        schedule: a schedule, or a curriculum's YAML file.
        name: what the callback is called on the command line.
        options: the other fields of `MacDropOptions`, such as `massive="scan.json"`.

    Raises:
        ValueError: an option does not exist, or has no such value.

    """
    chosen = MacDropOptions(schedule=schedule, **options)

    def made(_args: Any, trainer: Any) -> MacDropCallback:
        """Called by ms-swift's trainer, before it has a model to itself; it knows where the files of the model are."""
        return macdrop_callback(str(trainer.model_info.model_dir), chosen)

    callbacks_map[name] = made
