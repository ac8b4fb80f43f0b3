"""Which forward passes of a training step are the trained policy's, so that all others see the pre-trained rows.

Preference training and reinforcement learning compare the policy with a reference: the same model with its PEFT adapter
switched off, or with a frozen copy of the adapter active. MacDrop drops entries for the policy alone. A reference that
was dropped from as well would move from step to step, and would not be the model that the loss compares with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


class Policy:
    """The PEFT adapter that is trained, as the layers of PEFT within a model tell it.

    model: a transformers model, wrapped by PEFT or not. Prompt-learning methods have no such layers: all forward passes
    are then the policy's.
    """

    def __init__(self, model: nn.Module) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.layer: Any = next((one for one in model.modules() if isinstance(one, BaseTunerLayer)), None)
        self.trained: tuple[str, ...] = ()
        self.begin()

    def begin(self) -> None:
        """Take the adapter that is active now for the one that is trained. Called when a training step begins."""
        if self.layer is not None and not self.layer.disable_adapters:
            self.trained = tuple(self.layer.active_adapters)

    @property
    def absent(self) -> bool:
        """Whether a forward pass now is another model's: the adapter is switched off, or another one is active."""
        if self.layer is None:
            return False
        return bool(self.layer.disable_adapters) or tuple(self.layer.active_adapters) != self.trained
