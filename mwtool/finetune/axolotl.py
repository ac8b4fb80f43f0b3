"""MacDrop in axolotl, by its YAML alone: `plugins: [mwtool.finetune.axolotl.MacDropPlugin]` and a `macdrop:` key.

Tested with axolotl 0.19. This module imports axolotl, and nothing else of mwtool imports this module.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from mwtool.finetune.other_trainers import MacDropOptions, macdrop_callback
from mwtool.macdrop.callback import MacDropCallback


class MacDropArgs(BaseModel):
    """The key that the plugin adds to axolotl's configuration: a schedule, or all settings; without it, no MacDrop."""

    macdrop: str | MacDropOptions | None = None


class MacDropPlugin(BasePlugin):  # type: ignore[misc] # axolotl ships no annotations
    """Adds MacDrop's callback to the trainer that axolotl has built, for SFT and for preference training."""

    def get_input_args(self) -> str:
        """Where axolotl finds the model of the `macdrop` key."""
        return f"{MacDropArgs.__module__}.{MacDropArgs.__name__}"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[MacDropCallback]:
        """The callback for the base model of the configuration; none without a `macdrop` key.

        cfg: axolotl's configuration. Raises BadValue if the model has no massive weights.
        """
        found = cfg.get("macdrop")
        if found is None:
            return []
        options = MacDropOptions(schedule=found) if isinstance(found, str) else MacDropOptions(**found)
        made = macdrop_callback(
            str(cfg.get("base_model")),
            options,
            revision=cfg.get("revision_of_model") or None,
            trust_remote_code=bool(cfg.get("trust_remote_code")),
        )
        return [made]
