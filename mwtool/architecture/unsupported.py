"""Layouts that no adapter can describe, by model type, and why: better refused by name than approximated."""

from __future__ import annotations

_NO_FFN = "its layers are state-space or recurrent blocks without a feed-forward network"
_SECOND_MODEL = "its layers belong to an encoder-decoder or attend to another model's states, which bos alone lacks"
_POST_NORM = "it normalises the residual stream itself after the FFN, so no part of the stream is the FFN's"
_STREAMS = "it keeps several residual streams that each layer mixes"
_GEMMA4 = "its layers go on after the FFN, with inputs of their own, and rescale the whole residual stream"
_LLAMA4 = "its experts all run, on inputs that the router has scaled, and are not told which of them bos was sent to"

REASONS: dict[str, str] = {
    "apertus": "its activation has trained parameters of its own",
    "bitnet": "it normalises the intermediate state between the product of gate and up and the last matrix",
    "dbrx": "its experts lie one below the other in two-dimensional parameters, which cannot be read one by one",
    "deepseek_v4": _STREAMS,
    "falcon_h1": "it multiplies what its matrices give by constants inside the FFN",
    "minimax": "it rescales the residual stream itself in every layer",
    "nemotron_h": "each of its layers is either attention, a state-space block or an FFN, and most have no FFN",
    "rwkv": "it multiplies the FFN's output by a second gate",
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "xlstm"), _NO_FFN),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), _STREAMS),
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), _GEMMA4),
    **dict.fromkeys(("llama4", "llama4_text"), _LLAMA4),
    **dict.fromkeys(("bart", "marian", "mbart", "mllama", "pegasus", "trocr", "whisper"), _SECOND_MODEL),
    **dict.fromkeys(("bert", "electra", "openai-gpt", "roberta", "xlm-roberta", "xlnet"), _POST_NORM),
}
