"""A LoRA or DoRA adapter over a base model of which accelerate keeps layers on the CPU or on the disk.

PEFT itself removes accelerate's hooks and writes files with the base model's weights in them before it spreads the two
anew, or leaves the adapter without weights. Here the hooks stay, and the small matrices of the adapter are added where
their layers run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mwtool.errors import UnsupportedModel
from mwtool.interrupts import restored

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""Initial values of LoRA that leave the base weights as they are; others, such as pissa, change them when they load."""


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate loads some of its weights when they run."""
    return any(parameter.is_meta for parameter in model.parameters())


def refuse_unplaced(adapter: str, config: PeftConfig, how: str) -> None:
    """Raises UnsupportedModel for an adapter that holds, or changes, weights of the base model.

    adapter: its folder. config: as it states. how: what was to be done with it.
    """
    kind: Any = config
    whole = ("modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters")
    found = [name for name in whole if getattr(kind, name, None)]
    if kind.peft_type.value != "LORA":
        found = [kind.peft_type.value]
    elif getattr(kind, "bias", "none") != "none":
        found.append(f"bias {kind.bias}")
    elif kind.init_lora_weights not in KEEPS_BASE:
        found.append(f"init_lora_weights {kind.init_lora_weights}")
    if found:
        raise UnsupportedModel(
            f"the adapter {adapter} ({', '.join(found)}) cannot be {how}; expected LoRA or DoRA whose files hold no "
            f"weights of the base model; merge and save the two with PEFT, and take that"
        )


def with_adapter_over(
    base: PreTrainedModel, apply: Callable[[PreTrainedModel], PeftModel], *, merged: bool
) -> PeftModel:
    """The base model with an adapter, the hooks of accelerate where they were.

    apply: loads the adapter. The weights of the base model are not read: it sees their shapes, dtypes and devices.
    merged: add the adapter to the base weights, in place where they are in memory, else each time they are loaded. The
    sums are those of `merge_and_unload`, bit for bit; what offloaded weights are loaded from stays as it is.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    with stood_in(base):
        wrapped = apply(base)
    layers: list[Any] = [module for module in wrapped.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        offloaded = is_offloaded(layer.get_base_layer())
        if merged and offloaded:
            _merge_when_loaded(layer)
        elif merged:
            layer.merge()
        elif offloaded and getattr(layer, "lora_magnitude_vector", None):
            _keep_while_running(layer)
    return wrapped


@restored
def stood_in(base: PreTrainedModel, device: str = "cpu") -> Iterator[None]:
    """Weights that are absent replaced by zeros without memory, on the device where they run, inside the block.

    device: of those that no hook of accelerate loads.
    """
    places: dict[str, Any] = base.__dict__.pop("hf_device_map", None) or {}  # with which PEFT would spread it anew
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for module in base.modules():
            for name, parameter in list(module._parameters.items()):  # noqa: SLF001 - replaced in place, as accelerate's hooks do
                if parameter is not None and parameter.is_meta:
                    kept.append((module, name, parameter))
                    zero = torch.zeros((), dtype=parameter.dtype, device=_runs_on(module, device)).expand(
                        parameter.shape
                    )
                    module._parameters[name] = nn.Parameter(zero, requires_grad=False)  # noqa: SLF001 - likewise
        yield
    finally:
        for module, name, parameter in kept:
            module._parameters[name] = parameter  # noqa: SLF001 - likewise
        if places:
            base.__dict__["hf_device_map"] = places


def _runs_on(module: nn.Module, otherwise: str) -> Any:
    hook: Any = getattr(module, "_hf_hook", None)
    devices = (getattr(one, "execution_device", None) for one in getattr(hook, "hooks", (hook,)))
    return next((device for device in devices if device is not None), otherwise)


def _keep_while_running(layer: Any) -> None:
    """DoRA reads the base weights after the base layer has run: they are freed when the layer around it has."""
    inner = layer.get_base_layer()
    hook = inner._hf_hook  # noqa: SLF001 - accelerate's only name for it
    free = hook.post_forward

    def ended(_module: nn.Module, _args: Any, output: Any) -> Any:
        return free(inner, output)

    hook.post_forward = lambda _module, output: output
    layer.register_forward_hook(ended, always_call=True)


def _merge_when_loaded(layer: Any) -> None:
    inner = layer.get_base_layer()
    hook = inner._hf_hook  # noqa: SLF001 - accelerate's only name for it
    load, adapters = hook.pre_forward, list(layer.active_adapters)

    def loaded(module: nn.Module, *args: Any, **options: Any) -> Any:
        found = load(module, *args, **options)
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.clone()  # it may be the very tensor that it was loaded from
        layer.merged_adapters = []
        layer.merge()
        return found

    hook.pre_forward = loaded
    layer.merged_adapters = adapters  # so that it runs its base layer alone
