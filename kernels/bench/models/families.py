"""The model families of the support table, each as a small config: its own ops, few weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 4096  # That of the embedded model, whose tokenizer all families borrow.
WINDOW = 16  # Shorter than the table's prompt, so that it hides keys from the first token on.

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_WINDOWED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "head_dim": 64,
}
_GROUPED_ROUTER = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_OWN_HEAD_DIM = {"head_dim": ...}  # Not to be set.
_GRANITE = {
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.5,
    "logits_scaling": 4.0,
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_chunk_size": 8,
}
_STATE_SPACE = {"state_size": 8}

# Name in the table: transformers' model type, and what its config changes.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3": ("qwen3", {}),
    "Qwen2": ("qwen2", {}),
    "Qwen2-MoE": (
        "qwen2_moe",
        {"num_experts": 8, "shared_expert_intermediate_size": 48, **_EXPERTS},
    ),
    "Qwen3-MoE": ("qwen3_moe", {"num_experts": 8, "norm_topk_prob": True, **_EXPERTS}),
    "Qwen3.5 (hybrid)": ("qwen3_5_text", _HYBRID),
    "Qwen3.5-MoE (hybrid)": (
        "qwen3_5_moe_text",
        _HYBRID | {"num_experts": 8, "shared_expert_intermediate_size": 48} | _EXPERTS,
    ),
    "Qwen3-Next (hybrid)": (
        "qwen3_next",
        _HYBRID | {"num_experts": 8, "shared_expert_intermediate_size": 48} | _EXPERTS,
    ),
    "OLMo Hybrid": ("olmo_hybrid", _HYBRID),
    "Kimi Linear (hybrid, MLA)": (
        "kimi_linear",
        {
            "layer_types": _HYBRID["layer_types"],
            "linear_num_heads": 4,
            "linear_head_dim": 16,
            "mlp_layer_types": ["dense", "sparse"],
            "num_experts": 8,
            "num_experts_per_token": 2,
            "moe_intermediate_size": 48,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "num_key_value_heads": 4,
        },
    ),
    "Llama 3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "Llama 4": (
        "llama4_text",
        {
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "attention_chunk_size": WINDOW,
            "layer_types": ["chunked_attention", "full_attention"],
            "moe_layers": [1],
        },
    ),
    "Mistral": ("mistral", {"sliding_window": WINDOW}),
    "Mixtral": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "Gemma 2": ("gemma2", {**_WINDOWED, "query_pre_attn_scalar": 32}),
    "Gemma 3": ("gemma3_text", {**_WINDOWED, "query_pre_attn_scalar": 32}),
    "gpt-oss": ("gpt_oss", {**_WINDOWED, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "OLMo 2": ("olmo2", {}),
    "OLMoE": ("olmoe", {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2}),
    "OLMo 3": ("olmo3", _WINDOWED),
    "StableLM": ("stablelm", {"head_dim": 16, "use_qkv_bias": True}),
    "Phi-4": ("phi3", {"partial_rotary_factor": 1.0}),
    "Phi-3 (long rope)": (
        "phi3",
        {
            "head_dim": 16,
            "partial_rotary_factor": 1.0,
            "max_position_embeddings": 2048,
            "original_max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + i / 8 for i in range(8)],
                "long_factor": [1.0 + i for i in range(8)],
            },
        },
    ),
    "Phi-2": ("phi", {"head_dim": 16}),
    "Cohere 2": ("cohere2", _WINDOWED),
    "Granite": ("granite", _GRANITE),
    "Granite MoE": (
        "granitemoe",
        {**_GRANITE, "head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "StarCoder 2": ("starcoder2", {"head_dim": 16, "sliding_window": WINDOW}),
    "Nemotron": ("nemotron", {}),
    "SmolLM3": ("smollm3", {"head_dim": 16, "no_rope_layers": [1, 0]}),
    "EXAONE 4": ("exaone4", _WINDOWED),
    "ERNIE 4.5 MoE": (
        "ernie4_5_moe",
        {
            "head_dim": 16,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 48,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    "Seed-OSS": ("seed_oss", {}),
    "Helium": ("helium", {"head_dim": 16}),
    "Hunyuan": ("hunyuan_v1_dense", {}),
    "Hunyuan MoE": ("hunyuan_v1_moe", {"num_experts": 8, "moe_topk": 2}),
    "Apertus": ("apertus", {"head_dim": 16}),
    "Arcee": ("arcee", {}),
    "GLM-4": ("glm4", {}),
    "GLM-4.x MoE": (
        "glm4_moe",
        {**_EXPERTS, **_GROUPED_ROUTER, "first_k_dense_replace": 1, "use_qk_norm": True},
    ),
    "DeepSeek-V3 (MLA, MoE)": (
        "deepseek_v3",
        {**_MLA, **_EXPERTS, **_GROUPED_ROUTER, "first_k_dense_replace": 1},
    ),
    "DeepSeek-V2 (MLA, MoE)": (
        "deepseek_v2",
        {
            **_MLA,
            **_EXPERTS,
            **_GROUPED_ROUTER,
            "topk_method": "group_limited_greedy",
            "first_k_dense_replace": 1,
        },
    ),
    "GPT-NeoX": ("gpt_neox", {"rotary_pct": 0.25}),
    "GPT-2": ("gpt2", {}),
    "GPT-J": ("gptj", {"rotary_dim": 8}),
    "OPT": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0}),
    "Falcon": (
        "falcon",
        {**_OWN_HEAD_DIM, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    ),
    "Falcon (ALiBi)": (
        "falcon",
        {
            **_OWN_HEAD_DIM,
            "multi_query": False,
            "parallel_attn": False,
            "alibi": True,
            "bias": True,
        },
    ),
    "BLOOM (ALiBi)": ("bloom", {"hidden_dropout": 0.0}),
    "MPT (ALiBi)": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}),
    "Mamba": ("mamba", _STATE_SPACE),
    "Falcon-Mamba": ("falcon_mamba", _STATE_SPACE),
    "Mamba-2": ("mamba2", {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2}),
    "Nemotron-H (hybrid)": (
        "nemotron_h",
        {
            "num_hidden_layers": 4,
            "hybrid_override_pattern": "M*-M",
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 8,
        },
    ),
    "Granite 4 (hybrid, MoE)": (
        "granitemoehybrid",
        {
            **_MAMBA,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 48,
        },
    ),
    "Falcon-H1 (hybrid)": ("falcon_h1", {**_MAMBA, "mamba_d_ssm": 128}),
    "Bamba (hybrid)": ("bamba", {**_MAMBA, "attn_layer_indices": [1]}),
    "Zamba 2 (hybrid)": (
        "zamba2",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "n_mamba_heads": 8,
            "mamba_headdim": 16,
            "mamba_d_state": 16,
            "mamba_ngroups": 2,
            "chunk_size": 8,
            "num_mem_blocks": 1,
        },
    ),
    "Jamba (hybrid, MoE)": (
        "jamba",
        {
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "mamba_d_state": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "LFM2 (hybrid)": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
}


# Layers as large as those of published models, four of each, for a GPU.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-30B-A3B's layers": (
        "qwen3_moe",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_hidden_layers": 4,
            "initializer_range": 0.02,
        },
    ),
    "gpt-oss-20B's layers": (
        "gpt_oss",
        {
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "head_dim": 64,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "sliding_window": 128,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 4,
            "initializer_range": 0.02,
        },
    ),
}


def build_model(family: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """The family's model with random weights, the same in every process.

    A model of `SHAPES` is made on the device and in the dtype that it will run in, which differ.
    """
    is_small = family in FAMILIES
    model_type, changes = FAMILIES[family] if is_small else SHAPES[family]
    settings = {key: value for key, value in {**_COMMON, **changes}.items() if value is not ...}
    config = transformers.AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(0)
    with torch.device("cpu" if is_small else device), torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32 if is_small else dtype
        ).eval()
        for parameter in model.parameters():
            # What starts as zeros or ones (biases, sinks, norms) would hide an op that ignores it.
            if parameter.is_floating_point() and bool((parameter == parameter.flatten()[0]).all()):
                parameter += 0.2 * torch.randn_like(parameter)
    return model.to(dtype)


def save_model(
    family: str, dtype: torch.dtype, device: str, directory: Path, tokenizer: Path
) -> None:
    """A directory that AutoModelForCausalLM loads, with the tokenizer of another."""
    build_model(family, dtype, device).save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)
