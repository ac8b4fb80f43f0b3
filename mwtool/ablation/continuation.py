"""Continuations of a prompt by the unchanged and the attacked model: the paper's Figure 1b."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mwtool.ablation.means import edits_of, means_for
from mwtool.ablation.sweep import Sweep
from mwtool.errors import BadValue
from mwtool.evaluation.evaluate import Prepared
from mwtool.evaluation.perplexity import check_vocabulary
from mwtool.models.bos import find_bos
from mwtool.models.context import positions
from mwtool.models.load import Loaded
from mwtool.scan.targets import Group
from mwtool.surgery.attack import Attack, edited_together


def continuations(
    loaded: Loaded,
    group: Group,
    sweep: Sweep,
    tasks: Sequence[Prepared],
    prompt: str,
    *,
    bos: str = "auto",
    new_tokens: int = 48,
) -> list[tuple[str, str]]:
    """Continue `prompt` by greedy decoding: without an attack, and under each mode at the largest k.

    new_tokens: at most; fewer where the model has no more positions. Raises BadValue as `prompt_ids` does.
    """
    ids = prompt_ids(loaded, prompt, bos)
    most = positions(loaded.base.config)
    room = new_tokens if most is None else min(new_tokens, most - ids.shape[1])
    means = means_for(loaded, [group], sweep, tasks)
    said = []
    for mode in (Attack(), *sweep.modes):
        attack = mode.at(max(sweep.ks)) if mode.mode != "none" else mode
        rows = [target.indices[: attack.k] for target in group]
        with edited_together(loaded.base, edits_of(group, rows, means), attack):
            said.append((str(attack) if attack.mode != "none" else "original", _greedy(loaded, ids, room)))
    return said


def prompt_ids(loaded: Loaded, prompt: str, bos: str = "auto") -> Tensor:
    """bos and the prompt, (1, T).

    Raises BadValue without a tokenizer, for tokens the model does not have, or where it has no position for more.
    """
    if loaded.tokenizer is None:
        raise BadValue(f"{loaded.source.name} has no tokenizer; --generate needs one to read the prompt")
    first = find_bos(bos, loaded.tokenizer, loaded.base.config).id
    ids = [first, *loaded.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]]
    most = positions(loaded.base.config)
    if most is not None and len(ids) >= most:
        raise BadValue(f"the prompt has {len(ids)} tokens with bos and the model {most} positions; give a shorter one")
    whole = torch.tensor([ids])
    check_vocabulary(loaded.model, whole)
    return whole


def _greedy(loaded: Loaded, ids: Tensor, new_tokens: int) -> str:
    model: Any = loaded.model
    place = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        found = model.generate(
            input_ids=ids.to(place),
            attention_mask=torch.ones_like(ids, device=place),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=loaded.base.config.get_text_config().eos_token_id or 0,
        )
    assert loaded.tokenizer is not None
    return str(loaded.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))
