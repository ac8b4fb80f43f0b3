"""What llama.cpp calls a model's parts, how it stores them, and the transformers configuration they amount to.

One entry for each `general.architecture` that can be read. The names and the changes to undo are those of
llama.cpp's converters (conversion/*.py there). transformers has tables of its own for GGUF; they leave out
what these files do not repeat (Qwen 3's head width, an expert's width, Gemma's scaling of queries, rotary
scaling stored as a tensor), so that a model of another size is built wrongly without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mwtool.errors import UnsupportedModel
from mwtool.models.gguf_header import Header
from mwtool.models.gguf_metadata import BLOCK, Metadata
from mwtool.models.gguf_rotary import FACTORS, rotary

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA2 = _LLAMA | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3 = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_MIXTRAL = {
    **{part: path for part, path in _LLAMA.items() if not part.startswith("ffn")},
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_QWEN_MOE = {
    **{part: path for part, path in _LLAMA.items() if not part.startswith("ffn")},
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_QKV = ("attn_q", "attn_k", "attn_v")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """How a checkpoint's tensor lies in a GGUF file.

    tensor: GGUF's name. expert: entry along its first dimension, where it holds all experts.
    heads: of queries or keys whose rotary halves are interleaved, their number; None where they are not.
    norm: whether 1 was added. row: whether it is one row of a matrix, stored as a vector.
    """

    tensor: str
    expert: int | None = None
    heads: int | None = None
    norm: bool = False
    row: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One value of `general.architecture`.

    names: GGUF's name of a part of a layer -> module path within the layer; `{}` stands for an expert's number.
    biases: parts that have one. config: what the type's configuration has beyond what all have.
    interleaved: whether the rotary halves of queries and keys are. norms: whether 1 was added to norms.
    """

    model_type: str
    names: Mapping[str, str]
    biases: tuple[str, ...] = ()
    config: Callable[[Metadata], dict[str, Any]] = field(default=lambda _: {})
    interleaved: bool = False
    norms: bool = False


def _llama(data: Metadata) -> dict[str, Any]:
    biased = "blk.0.attn_q.bias" in data.tensors
    return {"attention_bias": biased, "mlp_bias": "blk.0.ffn_up.bias" in data.tensors}


def _mistral(_: Metadata) -> dict[str, Any]:
    return {"sliding_window": None}  # llama.cpp's file states none, and its graph has none


def _experts(data: Metadata) -> tuple[int, int]:
    """How many experts a layer has, as stated and as stored, and their width."""
    name = "blk.0.ffn_up_exps.weight"
    count, width, _ = data.shape(name, 3)
    data.agree("expert_count", data.count("expert_count"), count, name)
    return count, width


def _routed(data: Metadata) -> dict[str, Any]:
    return {"num_experts_per_tok": data.count("expert_used_count")}


def _mixtral(data: Metadata) -> dict[str, Any]:
    count, width = _experts(data)
    data.agree("feed_forward_length", data.count("feed_forward_length", width), width, "blk.0.ffn_up_exps.weight")
    return _routed(data) | {"num_local_experts": count, "sliding_window": None}


def _qwen_moe(data: Metadata) -> dict[str, Any]:
    count, width = _experts(data)
    return _routed(data) | {
        "num_experts": count,
        "moe_intermediate_size": width,
        "mlp_only_layers": [],  # llama.cpp has no dense layers in these architectures
        "decoder_sparse_step": 1,
    }


def _qwen2_moe(data: Metadata) -> dict[str, Any]:
    config = _qwen_moe(data)
    shared = next((name for name in data.tensors if name.endswith(".ffn_up_shexp.weight")), "blk.0.ffn_up_shexp.weight")
    return config | {"shared_expert_intermediate_size": data.shape(shared, 2)[0], "norm_topk_prob": False}


def _qwen3_moe(data: Metadata) -> dict[str, Any]:
    return _qwen_moe(data) | {"norm_topk_prob": True}  # llama.cpp: always, in this architecture


def _gemma2(data: Metadata) -> dict[str, Any]:
    return {
        "attn_logit_softcapping": data.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": data.number("final_logit_softcapping", 30.0),
        "sliding_window": data.window() or data.count("context_length"),
        "query_pre_attn_scalar": _query_scalar(data, largest=46),
    }


def _gemma3(data: Metadata) -> dict[str, Any]:
    window, layers = data.window(), data.layers()
    every = data.count("attention.sliding_window_pattern", 6) if window else 1
    return {
        "final_logit_softcapping": data.number("final_logit_softcapping")
        if data.has("final_logit_softcapping")
        else None,
        "sliding_window": window or data.count("context_length"),
        "layer_types": [
            "full_attention" if layer % every == every - 1 else "sliding_attention" for layer in range(layers)
        ],
        "query_pre_attn_scalar": _query_scalar(data, largest=62),
    }


def _query_scalar(data: Metadata, largest: int) -> float:
    """What queries are scaled by: Gemma's 27 B models, told by their layers as llama.cpp does, differ from the rest."""
    if data.layers() == largest:
        return data.count("embedding_length") / data.count("attention.head_count")
    return data.count("attention.key_length", 256)


def _phi3(data: Metadata) -> dict[str, Any]:
    config: dict[str, Any] = {"sliding_window": data.window()}
    if data.has("rope.scaling.original_context_length"):
        config["original_max_position_embeddings"] = data.count("rope.scaling.original_context_length")
    return config


ARCHITECTURES: Mapping[str, Architecture] = {
    "gemma": Architecture(model_type="gemma", names=_LLAMA, norms=True),
    "gemma2": Architecture(model_type="gemma2", names=_GEMMA2, config=_gemma2, norms=True),
    "gemma3": Architecture(model_type="gemma3_text", names=_GEMMA2 | _QK_NORMS, config=_gemma3, norms=True),
    "llama": Architecture(
        model_type="llama",
        names=_LLAMA,
        biases=(*_QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
        config=_llama,
        interleaved=True,
    ),
    "phi3": Architecture(model_type="phi3", names=_PHI3, config=_phi3),
    "qwen2": Architecture(model_type="qwen2", names=_LLAMA, biases=_QKV),
    "qwen2moe": Architecture(model_type="qwen2_moe", names=_QWEN_MOE, biases=_QKV, config=_qwen2_moe),
    "qwen3": Architecture(model_type="qwen3", names=_LLAMA | _QK_NORMS),
    "qwen3moe": Architecture(model_type="qwen3_moe", names=_QWEN_MOE | _QK_NORMS, config=_qwen3_moe),
}
_AS_LLAMA = {
    "mistral": Architecture(model_type="mistral", names=_LLAMA, config=_mistral, interleaved=True),
    "mixtral": Architecture(model_type="mixtral", names=_MIXTRAL, config=_mixtral, interleaved=True),
}
"""Types that llama.cpp converts to its architecture `llama`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """A GGUF file in transformers' terms.

    config: of the type's configuration class. tensors: checkpoint name -> how it is stored.
    rotary_fault: why positions after the first would be computed wrongly; None where they are right.
    """

    config: dict[str, Any]
    tensors: dict[str, Stored]
    rotary_fault: str | None


def conversion(header: Header) -> Conversion:
    """What a file's metadata and tensors amount to in transformers.

    Raises UnsupportedModel for an architecture, or a tensor of it, that is not known; BadCheckpoint where the file is
    incomplete or contradicts itself.
    """
    named = header.metadata.get("general.architecture")
    if not isinstance(named, str) or named not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{header.path} has architecture {named!r}; of GGUF files {', '.join(ARCHITECTURES)} can be read: "
            f"give the model it was made from"
        )
    data = Metadata(header, named)
    kind = _told_apart(data)
    layers, heads = data.layers(), data.count("attention.head_count")
    config, width = _common(data, heads)
    parameters, fault = rotary(data, width)
    config |= {"num_hidden_layers": layers, "model_type": kind.model_type, "rope_parameters": parameters}
    config |= kind.config(data)
    if kind.model_type == "gemma3_text":
        config["rope_parameters"] = {
            "full_attention": parameters,
            "sliding_attention": {"rope_type": "default", "rope_theta": data.number("rope.freq_base_swa", 10000.0)},
        }
    counts = {"attn_q": heads, "attn_k": config["num_key_value_heads"]}
    return Conversion(config=config, tensors=_stored(data, kind, counts), rotary_fault=fault)


def _told_apart(data: Metadata) -> Architecture:
    if data.architecture != "llama":
        return ARCHITECTURES[data.architecture]
    if data.has("expert_count"):
        return _AS_LLAMA["mixtral"]
    names = (data.header.metadata.get(f"general.{key}") for key in ("name", "basename"))
    biased = any(name.endswith(".bias") for name in data.tensors)
    mistral = any("mistral" in name.lower() for name in names if isinstance(name, str)) and not biased
    return _AS_LLAMA["mistral"] if mistral else ARCHITECTURES["llama"]


def _common(data: Metadata, heads: int) -> tuple[dict[str, Any], int]:
    """What all configurations have, and the width of a head."""
    rows, hidden = data.shape("token_embd.weight", 2)
    data.agree("embedding_length", data.count("embedding_length"), hidden, "token_embd.weight")
    width = _head_width(data, heads, hidden)
    pad = data.token("padding")
    config = {
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": _intermediate(data),
        "num_attention_heads": heads,
        "num_key_value_heads": data.count("attention.head_count_kv", heads),
        "head_dim": width,
        "max_position_embeddings": data.count("context_length"),
        "rms_norm_eps": data.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in data.tensors,
        "bos_token_id": data.token("bos"),
        "eos_token_id": data.token("eos"),
        "pad_token_id": pad if pad is not None and 0 <= pad < rows else None,
    }
    return config, width


def _head_width(data: Metadata, heads: int, hidden: int) -> int:
    name = "blk.0.attn_q.weight"
    if name in data.tensors:
        rows = data.shape(name, 2)[0]
        data.agree("attention.head_count", heads, heads if rows % heads == 0 else rows, name)
        if data.has("attention.key_length"):
            data.agree("attention.key_length", data.count("attention.key_length"), rows // heads, name)
        return rows // heads
    data.agree("attention.head_count", heads, heads if hidden % heads == 0 else hidden, "token_embd.weight")
    return hidden // heads


def _intermediate(data: Metadata) -> int:
    """I, as stated, and as the first layer has it, where that is no mixture of experts."""
    name, experts = "blk.0.ffn_down.weight", "blk.0.ffn_down_exps.weight"
    if name not in data.tensors:
        return data.count("feed_forward_length", data.shape(experts, 3)[2] if experts in data.tensors else None)
    found = data.shape(name, 2)[1]
    data.agree("feed_forward_length", data.count("feed_forward_length"), found, name)
    return found


def _stored(data: Metadata, kind: Architecture, heads: Mapping[str, int]) -> dict[str, Stored]:
    """Checkpoint name -> place in the file, for every tensor; raises UnsupportedModel for one the type has not."""
    stored: dict[str, Stored] = {}
    for name, entry in data.tensors.items():
        if name in FACTORS:
            continue
        part, _, ending = name.rpartition(".")
        match = BLOCK.fullmatch(part)
        prefix, part = (f"model.layers.{match.group(1)}.", match.group(2)) if match else ("", part)
        path = (kind.names if match else _OUTSIDE).get(part)
        if path is None or ending not in ("weight", "bias") or (ending == "bias" and part not in kind.biases):
            raise UnsupportedModel(
                f"{data.header.path} holds tensor {name}, for which {kind.model_type} has no place; "
                f"give the model it was made from"
            )
        count = heads.get(part) if kind.interleaved else None
        norm = kind.norms and part.endswith("norm")
        if "{}" in path:
            for expert in range(data.shape(name, 3)[0]):
                stored[f"{prefix}{path.format(expert)}.{ending}"] = Stored(tensor=name, expert=expert)
        else:
            row = part == "ffn_gate_inp_shexp" and len(entry.shape) == 1
            stored[f"{prefix}{path}.{ending}"] = Stored(tensor=name, heads=count, norm=norm, row=row)
    return stored
