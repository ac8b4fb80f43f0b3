"""The conformance kit: tests on a tiny random model that an adapter describes a model type correctly.

It runs seven checks, each of a property that scan, ablation or MacDrop relies on::

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
    """The result of one check. detail: what was found if it failed; what was checked if it passed."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Conformance:
    """The results for one model type. source: the distribution that provides the adapter."""

    model_type: str
    source: str
    checks: tuple[Check, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all checks, in order."""
        return NAMES

    @property
    def fault(self) -> str | None:
        """The first check that failed and why; None if all passed."""
        return next((f"{check.name}: {check.detail}" for check in self.checks if not check.passed), None)


def check_type(model_type: str, adapter: Installed) -> Conformance:
    """Run every check on a tiny model of this type; errors of the adapter count as a failed check."""
    try:
        checks = run_checks(adapter, tiny_config(model_type, adapter))
    except MwtoolError as fault:
        checks = (Check("shapes", passed=False, detail=str(fault)),)
    return Conformance(model_type, f"{adapter.plugin.distribution} {adapter.plugin.version}", checks)


def check_adapter(adapter: Adapter, config: PretrainedConfig) -> tuple[Check, ...]:
    """Run every check on a random float32 model of this configuration; docs/adapters.md says what each one proves.

    config: a tiny configuration, as `tiny_config` makes; the whole model is built.
    Raises AssertionError, which lists every check that failed.
    """
    checks = run_checks(adapter, config)
    failed = [f"{check.name}: {check.detail}" for check in checks if not check.passed]
    assert not failed, "\n".join([f"{adapter} does not describe {config.model_type!r}:", *failed])
    return checks


def run_checks(adapter: Adapter, config: PretrainedConfig) -> tuple[Check, ...]:
    """Run the checks in order, passed or not. If shapes do not match, no other check is run."""
    model = random_model(config)
    try:
        layers = decoder_layers(adapter, config)
        check_fit(adapter, layers, model)
    except MwtoolError as fault:
        return (Check("shapes", passed=False, detail=str(fault)),)
    ffns = sum(len(layer.ffns) for layer in layers)
    checks = [Check("shapes", passed=True, detail=f"{ffns} FFNs in {len(layers)} layers")]
    for name, check in CHECKS.items():
        checks.append(_run(name, partial(check, model, layers)))
    return tuple(checks)


def _run(name: str, check: Callable[[], str | None]) -> Check:
    try:
        fault = check()
    except (MwtoolError, *BUILD_ERRORS) as raised:  # a wrong description may fail anywhere in the model's code
        fault = str(raised) if isinstance(raised, MwtoolError) else f"{type(raised).__name__}: {raised}"
    return Check(name, fault is None, fault or "")


def tiny_config(model_type: str, adapter: Adapter | None = None, **options: Any) -> PretrainedConfig:
    """A tiny configuration of this type: three layers of width 32, set by the option names most types understand.

    adapter: its ``tiny[model_type]``, if any, holds further options that this type needs, or None for one that it does
    not accept. options: override both. For a type made of several configurations they apply to its text model.
    Raises BadPlugin if no such configuration can be built.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if model_type not in CONFIG_MAPPING:
        raise BadPlugin(
            f"transformers does not know model type {model_type!r}; register the type in the adapter's module "
            f"(AutoConfig.register, AutoModelForCausalLM.register)"
        )
    special = dict(getattr(adapter, "tiny", {}).get(model_type, {}))
    inner = special.pop("text_config", None)
    common = _without_none({**TINY, **(special if inner is None else inner), **options})
    try:
        if inner is None:
            return AutoConfig.for_model(model_type, **common)
        return AutoConfig.for_model(model_type, **special, text_config=common)
    except BUILD_ERRORS as fault:
        raise BadPlugin(_build_failure(model_type, fault)) from fault


BUILD_ERRORS = (
    StrictDataclassError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    IndexError,
    ZeroDivisionError,
)
"""Exceptions that model code raises for incompatible options."""


def _build_failure(model_type: str, fault: BaseException) -> str:
    return (
        f"a tiny model of type {model_type!r} could not be built: {line_of(fault)}; "
        f"add the options it needs to the adapter's `tiny`"
    )


def _without_none(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def random_model(config: PretrainedConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A model in which every number that a checkpoint holds is random: also norms, biases and router biases.

    Raises BadPlugin if the model cannot be built or run.
    """
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
    except BUILD_ERRORS as fault:
        raise BadPlugin(_build_failure(config.model_type, fault)) from fault
    return model
