"""The harness's model with bos put once, our progress and no bars of its own; imported only if lm-eval is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM

from mwtool.evaluation.measurement import OnProgress

if TYPE_CHECKING:
    import torch


class Model(HFLM):  # type: ignore[misc] # its base has no annotations
    """An HFLM, with its options. `prefix_token_id` begins every context; None: no token does.

    shortened: how many contexts so far were too long for the model and lost their first tokens after bos.
    """

    def __init__(self, *, on_progress: OnProgress | None, **options: Any) -> None:
        super().__init__(**options)
        self._on_progress, self._done, self._total, self._bare = on_progress, 0, 0, False
        self.shortened = 0

    def _progress(self, done: int) -> None:
        self._done += done
        if self._on_progress is not None and self._total:
            self._on_progress(min(self._done, self._total), self._total)

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,  # noqa: FBT001 # the harness's signature
        left_truncate_len: int | None = None,
        **_: Any,
    ) -> list[int]:
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=False)
        bos = self.custom_prefix_token_id
        if bos is None or add_special_tokens is False or self._bare:
            return ids[-left_truncate_len:] if left_truncate_len else ids
        ids = ids[1:] if ids[:1] == [bos] else ids  # the text may begin with bos
        return [bos, *(ids[1 - left_truncate_len :] if left_truncate_len and left_truncate_len > 1 else ids)]

    def tok_batch_encode(
        self, strings: Sequence[str], padding_side: str = "left", left_truncate_len: int | None = None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        encoded = [{"input_ids": self.tok_encode(one, left_truncate_len=left_truncate_len)} for one in strings]
        padded = self.tokenizer.pad(encoded, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def loglikelihood(self, requests: list[Any], **_: Any) -> Any:
        self._done, self._total = 0, len(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> Any:
        self._done, self._total = 0, 0
        self._bare = True  # rolling windows prepend the prefix token themselves
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)
        finally:
            self._bare = False

    def generate_until(self, requests: list[Any], **_: Any) -> Any:
        self._done, self._total = 0, len(requests)
        return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, override_bs: int | None = None, **_: Any) -> Any:
        fitting = [(text, self._shortened(context, len(aim)), aim) for text, context, aim in requests]
        return super()._loglikelihood_tokens(fitting, disable_tqdm=True, override_bs=override_bs)

    def _shortened(self, context: list[int], scored: int) -> list[int]:
        """Shorten the context to fit before the scored tokens, by dropping its first tokens after bos."""
        room = self.max_length + 1 - scored  # the last scored token is not an input
        if len(context) <= room or room < 1:
            return context
        self.shortened += 1
        kept = context[:1] if context[0] == self.custom_prefix_token_id else []
        return kept + context[len(context) - room + len(kept) :]

    def _model_call(self, inps: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        logits: torch.Tensor = super()._model_call(inps, *args, **more)
        self._progress(len(inps))
        return logits

    def _model_generate(self, context: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        found: torch.Tensor = super()._model_generate(context, *args, **more)
        self._progress(len(context))
        return found
