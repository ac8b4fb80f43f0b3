r"""The FFN matrices of a scan's events in the syntax of quantization tools: left alone, or at 8 bits.

No mainstream tool keeps single rows or columns, so whole matrices are named, gate, up and down of a layer together:
vLLM refuses a fused projection whose parts have different schemes. Patterns are anchored, so that layer 1 does not
also match layer 11.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mwtool.errors import BadValue, nearest
from mwtool.massive import SCHEMA

HEAD = "lm_head"
"""What transformers leaves unquantized by default; a list of our own replaces that default, so it is named again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What is exported.

    layers: decoder layer -> module names of its FFN matrices, as transformers names them.
    parameters: how many weights these matrices hold; None where the scan does not say.
    bits: 8 keeps them at 8 bits where the tool has a rule for that, None leaves them unquantized.
    model: for the comment.
    """

    model: str
    layers: Mapping[int, tuple[str, ...]]
    bits: int | None = None
    parameters: int | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        """Every module, first layer first."""
        return tuple(name for names in self.layers.values() for name in names)

    @property
    def comment(self) -> str:
        """What these lines are, in one line."""
        count = f", {self.parameters:,} weights" if self.parameters is not None else ""
        kept = "not quantized" if self.bits is None else f"kept at {self.bits} bits"
        layers = ", ".join(map(str, self.layers))
        return f"FFN matrices of layers {layers} of {self.model}{count}: whole matrices, {kept} (mwtool export)"


def read_scan(path: Path) -> dict[str, Any]:
    """A saved scan of schema mwtool.scan/2. Raises BadValue if the file is anything else."""
    from mwtool.files.scan_schema import ScanDocument
    from mwtool.files.schema import read_document

    document, _ = read_document(path, {SCHEMA: ScanDocument}, "mwtool scan -o")
    return document


def chosen_events(document: Mapping[str, Any], events: Sequence[int] | None) -> Sequence[int]:
    """The numbers of the events of a scan document that are exported. events: None for all.

    Raises BadValue for a number that does not exist and for a scan without events.
    """
    count = len(document["events"])
    if not count:
        raise BadValue(f"the scan of {document['model']} has no events, so there is nothing to protect")
    for number in events or ():
        if not 0 <= number < count:
            raise BadValue(f"event {number} does not exist; the scan has events 0 to {count - 1}")
    return range(count) if events is None else events


def select(document: Mapping[str, Any], events: Sequence[int] | None, bits: int | None) -> Selection:
    """The events of a scan document (schema mwtool.scan/2) that are exported.

    events: their numbers as the scan prints them; None for all. Raises BadValue as `chosen_events` does.
    """
    found, chosen = document["events"], chosen_events(document, events)
    layers: dict[int, tuple[str, ...]] = {}
    for event in sorted((found[number] for number in chosen), key=lambda one: one["layer"]):
        names = {place["parameter"].removesuffix(".weight") for place in event["weights"]}
        layers[event["layer"]] = tuple(sorted({*layers.get(event["layer"], ()), *names}))
    width, hidden = document["shape"]["intermediate_size"], document["shape"]["hidden_size"]
    dense = document["shape"]["experts"] is None
    matrices = sum(3 if any("gate" in name for name in names) else 2 for names in layers.values())
    return Selection(
        model=document["model"], layers=layers, bits=bits, parameters=matrices * width * hidden if dense else None
    )


def exported(tool: str, chosen: Selection) -> str:
    """The text for one of `TOOLS`. Raises BadValue for another name, or where the tool has no rule for `bits`."""
    if tool not in TOOLS:
        raise BadValue(f"--to {tool} is not known; {nearest(tool, list(TOOLS))}")
    if chosen.bits is not None and tool not in WITH_BITS:
        others = f"{', '.join(WITH_BITS[:-1])} or {WITH_BITS[-1]}"
        raise BadValue(f"{tool} can only leave modules unquantized; leave out --bits, or export to {others}")
    return TOOLS[tool](chosen)


def _patterns(chosen: Selection) -> list[str]:
    r"""One regular expression a layer: ``^model\.layers\.1\.mlp\.(?:down_proj|gate_proj|up_proj)$``."""
    return [_pattern(names) for names in chosen.layers.values()]


def _pattern(names: Sequence[str]) -> str:
    prefixes = {name.rpartition(".")[0] for name in names}
    if len(prefixes) == 1:
        leaves = "|".join(re.escape(name.rpartition(".")[2]) for name in names)
        return f"^{re.escape(prefixes.pop())}\\.(?:{leaves})$"
    return f"^(?:{'|'.join(map(re.escape, names))})$"


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _compressed_tensors(chosen: Selection) -> str:
    """`ignore` and `config_groups` of a compressed-tensors `quantization_config`."""
    targets = [f"re:{pattern}" for pattern in _patterns(chosen)]
    rest = _weights(4, "group")
    if chosen.bits is None:
        return _json({"ignore": [HEAD, *targets], "config_groups": {"group_0": {"targets": ["Linear"], **rest}}})
    groups = {"events": {"targets": targets, **_weights(chosen.bits, "channel")}}
    return _json({"ignore": [HEAD], "config_groups": {**groups, "group_0": {"targets": ["Linear"], **rest}}})


def _weights(bits: int, strategy: str) -> dict[str, Any]:
    grouped = {"group_size": 128} if strategy == "group" else {}
    return {"weights": {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, **grouped}}


def _llm_compressor(chosen: Selection) -> str:
    """A recipe file; its modifier takes the keys of compressed-tensors."""
    import yaml

    modifier = {"QuantizationModifier": json.loads(_compressed_tensors(chosen))}
    recipe = {"quantization_stage": {"quantization_modifiers": modifier}}
    return f"# {chosen.comment}\n{yaml.safe_dump(recipe, sort_keys=False)}"


def _gptqmodel(chosen: Selection) -> str:
    """`dynamic` of QuantizeConfig: `-:` leaves a module out, `+:` overrides."""
    if chosen.bits is None:
        return _json({"dynamic": {f"-:{pattern}": {} for pattern in _patterns(chosen)}})
    return _json({"dynamic": {f"+:{pattern}": {"bits": chosen.bits} for pattern in _patterns(chosen)}})


def _torchao(chosen: Selection) -> str:
    """Python: the first pattern that matches wins, None leaves the module alone."""
    kept = "None" if chosen.bits is None else "Int8WeightOnlyConfig()"
    rules = "".join(f"        {f're:{pattern}'!r}: {kept},\n" for pattern in _patterns(chosen))
    imports = "FqnToConfig, Int4WeightOnlyConfig" + ("" if chosen.bits is None else ", Int8WeightOnlyConfig")
    return (
        f"# {chosen.comment}\n"
        f"from collections import OrderedDict\n\n"
        f"from torchao.quantization import {imports}, quantize_\n\n"
        f"config = FqnToConfig(\n    OrderedDict({{\n{rules}"
        f'        "re:.*_proj": Int4WeightOnlyConfig(),  # everything else, as you like it\n    }})\n)\n'
        f"# quantize_(model, config, filter_fn=None)\n"
    )


def _skip(key: str) -> Callable[[Selection], str]:
    """A list of full module names: a suffix of layer 1 would also match layer 11."""
    return lambda chosen: _json({key: [HEAD, *chosen.modules]})


def _modelopt(chosen: Selection) -> str:
    """An ordered list, later entries win; wildcards as in a shell."""
    rules = [{"quantizer_name": f"{name}.*", "enable": False} for name in chosen.modules]
    if chosen.bits is not None:
        rules = [
            {"quantizer_name": f"{name}.weight_quantizer", "cfg": {"num_bits": chosen.bits, "axis": 0}}
            for name in chosen.modules
        ]
    return _json(rules)


def _llama_cpp(chosen: Selection) -> str:
    """`--tensor-type-file`: regex=type apart by white space, no comments, lower case."""
    kind = "q8_0" if chosen.bits is not None else "f16"
    lines = []
    for layer, names in chosen.layers.items():
        experts = "_exps" if any(name.endswith("experts") or ".experts." in name for name in names) else ""
        lines.append(f"blk\\.{layer}\\.ffn_(gate|up|down){experts}\\.weight={kind}\n")
    return "".join(lines)


def _mlx(chosen: Selection) -> str:
    """Python: a `class_predicate` of mlx.nn.quantize."""
    kept = "False" if chosen.bits is None else f'{{"bits": {chosen.bits}, "group_size": 64}}'
    names = "".join(f"    {name!r},\n" for name in chosen.modules)
    return (
        f"# {chosen.comment}\n"
        f"EVENTS = {{\n{names}}}\n\n\n"
        f"def class_predicate(path, module):\n"
        f'    if path in EVENTS:\n        return {kept}\n    return hasattr(module, "to_quantized")\n'
    )


TOOLS: dict[str, Callable[[Selection], str]] = {
    "llm-compressor": _llm_compressor,
    "compressed-tensors": _compressed_tensors,
    "gptqmodel": _gptqmodel,
    "torchao": _torchao,
    "llama.cpp": _llama_cpp,
    "bitsandbytes": _skip("llm_int8_skip_modules"),
    "fp8": _skip("modules_to_not_convert"),
    "awq": _skip("modules_to_not_convert"),
    "hqq": _skip("skip_modules"),
    "modelopt": _modelopt,
    "mlx": _mlx,
}
"""Tool -> its syntax."""
WITH_BITS = ("llm-compressor", "compressed-tensors", "gptqmodel", "torchao", "llama.cpp", "modelopt", "mlx")
"""Tools with a rule that gives modules other bits; the rest only leave modules out."""
