"""Conformance kit: proves on a tiny random model that what an adapter says about a model type is so.

Seven checks, each a property that scan, ablation or MacDrop relies on::

    from mwtool.testing import check_adapter, tiny_config

    def test_adapter() -> None:
        check_adapter(ADAPTER, tiny_config("my_type"))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from mwtool.architecture.layout import Adapter
from mwtool.architecture.registry import Installed
from mwtool.architecture.validate import check_fit, decoder_layers
from mwtool.errors import BadPlugin, MwtoolError, line_of
from mwtool.models.source import model_class
from mwtool.testing.checks import BOS, CHECKS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NAMES = ("shapes", *CHECKS)
TINY: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": BOS,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True, slots=True)
class Check:
    """One property; `detail` says what was found where it does not hold, or what it was held on."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Conformance:
    """Every check of one model type; `source` is the distribution its adapter came with."""

    model_type: str
    source: str
    checks: tuple[Check, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All checks there are, in order."""
        return NAMES

    @property
    def fault(self) -> str | None:
        """The first check that failed and why; None if all passed."""
        return next((f"{check.name}: {check.detail}" for check in self.checks if not check.passed), None)


def check_type(model_type: str, adapter: Installed) -> Conformance:
    """Every check on a tiny model of this type, faults of the adapter among them."""
    try:
        checks = run_checks(adapter, tiny_config(model_type, adapter))
    except MwtoolError as fault:
        checks = (Check("shapes", passed=False, detail=str(fault)),)
    return Conformance(model_type, f"{adapter.plugin.distribution} {adapter.plugin.version}", checks)


def check_adapter(adapter: Adapter, config: PretrainedConfig) -> tuple[Check, ...]:
    """Run every check on a random float32 model of this configuration; see docs/adapters.md for what each proves.

    config: a tiny one, see `tiny_config`; the model is built whole.
    Raises AssertionError with every check that failed.
    """
    checks = run_checks(adapter, config)
    failed = [f"{check.name}: {check.detail}" for check in checks if not check.passed]
    assert not failed, "\n".join([f"{adapter} does not describe {config.model_type!r}:", *failed])
    return checks


def run_checks(adapter: Adapter, config: PretrainedConfig) -> tuple[Check, ...]:
    """The checks in order, passed or not. Where shapes do not fit, the rest is not tried."""
    model = random_model(config)
    try:
        layers = decoder_layers(adapter, config)
        check_fit(adapter, layers, model)
    except MwtoolError as fault:
        return (Check("shapes", passed=False, detail=str(fault)),)
    kinds = sum(len(layer.ffns) for layer in layers)
    checks = [Check("shapes", passed=True, detail=f"{kinds} networks in {len(layers)} layers")]
    for name, check in CHECKS.items():
        checks.append(_run(name, partial(check, model, layers)))
    return tuple(checks)


def _run(name: str, check: Callable[[], str | None]) -> Check:
    try:
        fault = check()
    except (MwtoolError, *UNBUILDABLE) as raised:  # what does not fit may fail anywhere in the model's own code
        fault = str(raised) if isinstance(raised, MwtoolError) else f"{type(raised).__name__}: {raised}"
    return Check(name, fault is None, fault or "")


def tiny_config(model_type: str, adapter: Adapter | None = None, **options: Any) -> PretrainedConfig:
    """A configuration of this type: three layers of width 32, under the option names most types understand.

    adapter: where ``adapter.tiny[model_type]`` is found, the options this type needs besides, None for one that it
    does not take; given `options` win. For a type made of several configurations they go to its text model.
    Raises BadPlugin where no such configuration can be made.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if model_type not in CONFIG_MAPPING:
        raise BadPlugin(
            f"transformers does not know model type {model_type!r}; have the adapter's module register the type "
            f"(AutoConfig.register, AutoModelForCausalLM.register)"
        )
    special = dict(getattr(adapter, "tiny", {}).get(model_type, {}))
    inner = special.pop("text_config", None)
    common = _taken({**TINY, **(special if inner is None else inner), **options})
    try:
        if inner is None:
            return AutoConfig.for_model(model_type, **common)
        return AutoConfig.for_model(model_type, **special, text_config=common)
    except UNBUILDABLE as fault:
        raise BadPlugin(_unbuildable(model_type, fault)) from fault


UNBUILDABLE = (
    StrictDataclassError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    IndexError,
    ZeroDivisionError,
)
"""What model code raises when options do not go together."""


def _unbuildable(model_type: str, fault: BaseException) -> str:
    return (
        f"no tiny model of type {model_type!r} can be made: {line_of(fault)}; "
        f"give the options it needs in the adapter's `tiny`"
    )


def _taken(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def random_model(config: PretrainedConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A model whose every number that a checkpoint holds is random: norms, biases, what routers add to scores."""
    torch.manual_seed(seed)
    try:
        model: PreTrainedModel = model_class(config).from_config(config, dtype=dtype).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        stored = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in stored and buffer.is_floating_point():
                nn.init.normal_(buffer, std=0.3)
        with torch.no_grad():
            model(input_ids=torch.tensor([[BOS]]), use_cache=False)
    except UNBUILDABLE as fault:
        raise BadPlugin(_unbuildable(config.model_type, fault)) from fault
    return model
