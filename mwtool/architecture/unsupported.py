"""Model types that no adapter can describe, with the reason: they are refused rather than approximated."""

from __future__ import annotations

_NO_FFN = "its layers are state-space or recurrent blocks without a feed-forward network"
_SECOND_MODEL = "its layers attend to the states of an encoder or of another model, which bos alone does not have"
_POST_NORM = "it normalizes the whole residual stream after the FFN, so the FFN's contribution cannot be told apart"
_STREAMS = "it has several residual streams that each layer mixes"
_GEMMA4 = "its layers add another input after the FFN and rescale the whole residual stream"
_LLAMA4 = "all its experts run, on inputs scaled by the router, so the expert to which bos is routed cannot be captured"

REASONS: dict[str, str] = {
    "apertus": "its activation function has trained parameters",
    "bitnet": "it normalizes the intermediate state between the product of gate and up and the down projection",
    "dbrx": "its experts are concatenated in two-dimensional parameters and cannot be read one by one",
    "deepseek_v4": _STREAMS,
    "falcon_h1": "it multiplies the outputs of its matrices by constants inside the FFN",
    "minimax": "it rescales the residual stream in every layer",
    "nemotron_h": "each of its layers is either attention, a state-space block or an FFN, and most have no FFN",
    "rwkv": "it multiplies the FFN's output by a second gate",
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "xlstm"), _NO_FFN),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), _STREAMS),
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), _GEMMA4),
    **dict.fromkeys(("llama4", "llama4_text"), _LLAMA4),
    **dict.fromkeys(("bart", "marian", "mbart", "mllama", "pegasus", "trocr", "whisper"), _SECOND_MODEL),
    **dict.fromkeys(("bert", "electra", "openai-gpt", "roberta", "xlm-roberta", "xlnet"), _POST_NORM),
}
