"""A curriculum from a YAML file; every fault names the file, the line and the character.

k: 5
scope: massive            # massive | others | all
resample: step            # step | microbatch
masks: shared             # shared | separate
seed: 0
layers: [2, 11]           # rows of these decoder layers, from 0; left out: of the massive layer
schedule: step:0.8        # or, one after another:
phases:
  - schedule: constant:0.8
    share: 0.25           # of all steps; or steps: 100
  - schedule: linear:0.8-0.0
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from mwtool.errors import BadSyntax, BadValue, nearest
from mwtool.macdrop.curriculum import CHOICES, Curriculum, Phase, Schedule, curriculum_of, parse_schedule

_KEYS = ("k", "scope", "resample", "masks", "seed", "layers", "schedule", "phases")
_PHASE_KEYS = ("schedule", "steps", "share")


def read_curriculum(text: str) -> Curriculum:
    """What `--macdrop` means: a schedule in one line, or the name of a YAML file.

    Raises BadSyntax for a schedule, BadValue for a file.
    """
    if not text.endswith((".yaml", ".yml")):
        return curriculum_of(text)
    try:
        content = Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise BadValue(f"curriculum {text} cannot be read: {' '.join(str(fault).split())}") from fault
    return parse_curriculum(content, text)


def parse_curriculum(content: str, name: str = "curriculum") -> Curriculum:
    """A curriculum from YAML; raises BadValue, naming `name`, line and character."""
    try:
        root = yaml.compose(content, Loader=yaml.SafeLoader)
    except yaml.YAMLError as fault:
        raise BadValue(f"{name} is no YAML: {' '.join(str(fault).split())}") from fault
    except RecursionError as fault:
        raise BadValue(f"{name} is nested too deeply; expected keys such as schedule") from fault
    if root is None:
        raise BadValue(f"{name} is empty; expected keys such as schedule")
    return _File(name).curriculum(root)


class _File:
    """Turns YAML nodes, which know their place, into a curriculum."""

    def __init__(self, name: str) -> None:
        self.name = name

    def curriculum(self, root: yaml.Node) -> Curriculum:
        nodes = self._mapping(root, _KEYS)
        if ("schedule" in nodes) == ("phases" in nodes):
            raise self._fault(root, "expected either schedule or phases")
        whole: dict[str, Any] = {name: self._choice(nodes[name], name) for name in CHOICES if name in nodes}
        if "k" in nodes:
            whole["k"] = self._number(nodes["k"], "k", int, "a whole number, 1 or more", lambda value: value >= 1)
        if "seed" in nodes:
            whole["seed"] = self._number(nodes["seed"], "seed", int, "a whole number, 0 or more", lambda v: v >= 0)
        if "layers" in nodes:
            whole["layers"] = self._layers(nodes["layers"])
        if "phases" in nodes:
            return Curriculum(phases=self._phases(nodes["phases"]), **whole)
        return Curriculum(phases=(Phase(self._schedule(nodes["schedule"])),), **whole)

    def _layers(self, node: yaml.Node) -> tuple[int, ...]:
        expected = "a layer's number, 0 or more"
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise self._fault(node, "layers must be a list of numbers, such as [2, 11]")
        found = tuple(self._number(one, "a layer", int, expected, lambda value: value >= 0) for one in node.value)
        twice = next((at for at, layer in enumerate(found) if layer in found[:at]), None)
        if twice is not None:
            raise self._fault(node.value[twice], f"layer {found[twice]} is named twice")
        return found

    def _phases(self, node: yaml.Node) -> tuple[Phase, ...]:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise self._fault(node, "phases must be a list of schedules")
        last = len(node.value) - 1
        phases = tuple(self._phase(one, last=index == last) for index, one in enumerate(node.value))
        if sum(phase.share or 0.0 for phase in phases) >= 1:
            raise self._fault(node, "the shares of the phases sum to 1 or more; nothing is left for the last one")
        return phases

    def _phase(self, node: yaml.Node, *, last: bool) -> Phase:
        nodes = self._mapping(node, _PHASE_KEYS)
        if "schedule" not in nodes:
            raise self._fault(node, "this phase has no schedule")
        schedule, lengths = self._schedule(nodes["schedule"]), sorted(nodes.keys() & {"steps", "share"})
        if last and lengths:
            raise self._fault(nodes[lengths[0]], f"the last phase takes the steps left; remove {lengths[0]}")
        if not last and len(lengths) != 1:
            raise self._fault(node, "a phase before the last needs either steps or share")
        if "steps" in nodes:
            return Phase(schedule, steps=self._number(nodes["steps"], "steps", int, "1 or more", lambda v: v >= 1))
        if "share" in nodes:
            share = self._number(nodes["share"], "share", float, "between 0 and 1", lambda value: 0 < value < 1)
            return Phase(schedule, share=share)
        return Phase(schedule)

    def _mapping(self, node: yaml.Node, known: Sequence[str]) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise self._fault(node, f"expected keys and values; known are {', '.join(known)}")
        found: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = str(key.value)
            if name not in known:
                raise self._fault(key, f"unknown key {name!r}; {nearest(name, known)}")
            if name in found:
                raise self._fault(key, f"{name} is given twice")
            found[name] = value
        return found

    def _schedule(self, node: yaml.Node) -> Schedule:
        if not isinstance(node, yaml.ScalarNode):
            raise self._fault(node, "expected a schedule such as step:0.8")
        try:
            return parse_schedule(node.value)
        except BadSyntax as fault:
            block = node.style in {"|", ">"}  # such a text begins on a line of its own; point at its mark
            offset = 0 if block else fault.position + (1 if node.style else 0)  # a quoted one begins after its quote
            raise self._fault(node, str(fault).partition(": ")[2], offset) from fault

    def _choice(self, node: yaml.Node, name: str) -> str:
        value = str(node.value)
        if value not in CHOICES[name]:
            raise self._fault(node, f"{name} is {value!r}; {nearest(value, CHOICES[name])}")
        return value

    def _number(self, node: yaml.Node, name: str, kind: type[Any], expected: str, fits: Callable[[Any], bool]) -> Any:
        try:
            value = yaml.SafeLoader("").construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError, TypeError):
            value = None
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole or (kind is float and isinstance(value, float))) or not fits(value):
            raise self._fault(node, f"{name} is {node.value!r}; expected {expected}")
        return kind(value)

    def _fault(self, node: yaml.Node, message: str, offset: int = 0) -> BadValue:
        mark = node.start_mark
        return BadValue(f"{self.name}, line {mark.line + 1}, character {mark.column + offset + 1}: {message}")
