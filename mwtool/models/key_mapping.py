"""Key mapping: which tensors of a checkpoint belong to which decoder layer, parameter or routed expert.

Names are converted by transformers. Routed experts are listed separately, so that a layer can
be read without them, and each expert by itself.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mwtool.errors import BadCheckpoint

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from mwtool.models.checkpoint import Checkpoint
    from mwtool.models.remote_tensors import Piece


@dataclass(frozen=True, slots=True)
class ExpertTensors:
    """The checkpoint tensors of the parameters in one module of routed experts.

    count: experts in the module.
    groups: for each parameter, groups of checkpoint names that are stacked or stored as one: a group has
        one name an expert, in order, or one name for all of them.
    """

    count: int
    groups: dict[str, list[list[str]]]

    def of(self, experts: Sequence[int]) -> dict[str, list[int] | None]:
        """Checkpoint names that hold these experts -> the entries to read if a tensor holds all experts, else None.

        Raises BadCheckpoint if some experts are absent.
        """
        wanted: dict[str, list[int] | None] = {}
        for parameter, groups in self.groups.items():
            for group in groups:
                if len(group) == 1:
                    wanted[group[0]] = list(experts)
                elif len(group) == self.count:
                    wanted |= dict.fromkeys(group[expert] for expert in experts)
                else:
                    raise BadCheckpoint(
                        f"the checkpoint has {len(group)} tensors like {group[0]} for {parameter}; "
                        f"expected {self.count}, one for each expert"
                    )
        return wanted

    def names(self, parameter: str, expert: int) -> list[str]:
        """The checkpoint tensors of one expert's part of a parameter."""
        return [group[0 if len(group) == 1 else expert] for group in self.groups.get(parameter, [])]


class Rows:
    """A lazy selection of entries along the first dimension of a lazy tensor."""

    def __init__(self, name: str, tensor: Any, rows: Sequence[int]) -> None:
        self.name, self.tensor, self.rows = name, tensor, rows

    def __getitem__(self, index: Any) -> Tensor:
        import torch

        return torch.cat([self.tensor[row : row + 1] for row in self.rows])[index]

    def get_shape(self) -> list[int]:
        """As in the slices of safetensors."""
        shape = self.tensor.get_shape() if hasattr(self.tensor, "get_shape") else self.tensor.shape
        return [len(self.rows), *shape[1:]]

    def get_dtype(self) -> Any:
        """As in the slices of safetensors."""
        return self.tensor.get_dtype() if hasattr(self.tensor, "get_dtype") else self.tensor.dtype


def pieces(tensor: Any) -> list[Piece]:
    """What has to be fetched from the Hub before a lazy tensor is read; nothing of one that is on this machine."""
    lazy, rows = (tensor.tensor, tensor.rows) if isinstance(tensor, Rows) else (tensor, None)
    return list(lazy.pieces(rows)) if hasattr(lazy, "pieces") else []


@dataclass(frozen=True, slots=True)
class TensorMap:
    """The checkpoint names of a model's weights.

    names: path of a decoder layer, or parameter name -> checkpoint names. A path never equals a parameter name.
    experts: path of a module of routed experts -> its tensors, which are not in the `names` of the layer.
    """

    names: dict[str, list[str]]
    experts: dict[str, ExpertTensors]


def tensor_map(
    model: PreTrainedModel, files: Sequence[str], layers: Sequence[str], experts: Sequence[str], mapping: list[Any]
) -> TensorMap:
    """Group the tensor names of a checkpoint, `files`, by decoder layer and by module of routed experts.

    Tensors that the model does not use are left out, such as the masks in older checkpoints of Pythia.
    mapping: transformers' weight conversions for this model.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    own = model.state_dict()
    owner = re.compile("|".join(re.escape(path) for path in sorted(layers, key=len, reverse=True)) + r"(?=\.)")
    names: dict[str, list[str]] = defaultdict(list)
    groups: dict[str, dict[str, dict[str | None, list[str]]]] = {path: {} for path in experts}
    for name in sorted(files, key=dot_natural_key):  # the order in which transformers stacks them
        parameter, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if parameter not in own and name in own:
            parameter = name
        if parameter not in own:
            continue
        names[parameter].append(name)
        module, found = parameter.rpartition(".")[0], owner.match(parameter)
        if module in groups:
            groups[module].setdefault(parameter, {}).setdefault(pattern, []).append(name)
        elif found:
            names[found.group()].append(name)
    sorted_out = {path: _experts(model, path, groups[path]) for path in experts}
    return TensorMap(_with_ties(model, names), sorted_out)


def _experts(model: PreTrainedModel, path: str, groups: dict[str, dict[str | None, list[str]]]) -> ExpertTensors:
    counts = {parameter.shape[0] for parameter in model.get_submodule(path).parameters(recurse=False)}
    return ExpertTensors(counts.pop(), {parameter: list(made_of.values()) for parameter, made_of in groups.items()})


def _with_ties(model: PreTrainedModel, names: dict[str, list[str]]) -> dict[str, list[str]]:
    """Map a tied parameter that is absent from the checkpoint to the one it is tied to."""
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        for absent, present in ((target, source), (source, target)):
            if absent not in names and present in names:
                names[absent] = names[present]
    return dict(names)


def absent(parameter: str, checkpoint: Checkpoint, more: str = "") -> str:
    """Why a parameter has no tensor, to follow the model's name: the prefix that is in the way, if that is it.

    parameter: its name in the model. more: how many others are absent, in words.
    A name differs by a prefix where it ends as the parameter does, from a layer's number or the last three parts on;
    or where taking parts out of one of the two gives the other (`model.layers.0._orig_mod.mlp`).
    """
    missing = f"has no tensor for {parameter}{more}"
    wanted = parameter.split(".")
    for name, file in checkpoint.lost.items():
        if name.endswith(wanted[-1]) and (name == parameter or _extra(name.split("."), wanted)):
            return f"{missing}: {file} does not hold {name}, which {checkpoint.index} says it does; get it again"
    near = min(
        (name for name in checkpoint.files if name.endswith(wanted[-1]) and _extra(name.split("."), wanted)),
        key=lambda name: (abs(name.count(".") - len(wanted) + 1), name),
        default=None,
    )
    if near is None:
        return f"{missing}; it is incomplete"
    extra, lacking = _extra(near.split("."), wanted) or ([], [])
    parts = [f"with {_dotted(extra)} in it"] if extra else []
    parts += [f"without {_dotted(lacking)}"] if lacking else []
    return f"{missing}; it has {near}, {' and '.join(parts)}: rename its tensors"


def _extra(found: list[str], wanted: list[str]) -> tuple[list[str], list[str]] | None:
    """Parts that only the one and only the other name has, at one place; None where they do not name one tensor."""
    start, end, least = 0, 0, min(len(found), len(wanted))
    while end < least and found[-1 - end] == wanted[-1 - end]:
        end += 1
    while start < least - end and found[start] == wanted[start]:
        start += 1
    extra, lacking = found[start : len(found) - end], wanted[start : len(wanted) - end]
    numbers = any(part.isdigit() for part in (*extra, *lacking))  # another layer's, or another expert's
    alike = any(part.isdigit() for part in wanted[len(wanted) - end :]) or end >= TAIL or not (extra and lacking)
    return None if numbers or not (extra or lacking) or not alike or not end else (extra, lacking)


TAIL = 3
"""Last parts of two names that must agree for them to be taken for one tensor's, where no layer's number is among."""


def _dotted(parts: list[str]) -> str:
    return f"{'.'.join(parts)}."
