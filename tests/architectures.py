"""Tiny random models of real architectures: the classes of transformers, a few thousand weights each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from transformers import PreTrainedModel

# One set of sizes under the names that most configurations give them.
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # wide, so that random weights give distributions worth sampling from
}
_IDS = {name: SIZES[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
_WIDE = {"initializer_range": SIZES["initializer_range"]}
_HEAD = {"head_dim": 12}
_WINDOW = {**_HEAD, "num_hidden_layers": 6, "sliding_window": 12}
_EXPERTS = {"num_hidden_layers": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
# every other block attends in full, so that what stands at the beginning of a long prompt reaches its end
_LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 12,
           "full_attention_interval": 2}  # fmt: skip
_STATES = {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_d_state": 8, "mamba_n_groups": 1}
# a table of learned positions is a limit, and the prompts of the evaluation are long
_TABLE = 2048


def _of(family: str, *parts: dict[str, Any], head: str = "ForCausalLM", **more: Any) -> Callable[[], PreTrainedModel]:
    """A maker of the family's class from its configuration; later settings win."""

    def make() -> PreTrainedModel:
        names = {name: value for part in (*parts, more) for name, value in part.items()}
        text = f"{family}TextConfig"
        config = getattr(transformers, text if hasattr(transformers, text) else f"{family}Config")
        return getattr(transformers, family + head)(config(**names))

    return make


def _gemma3_text(**kwargs: Any) -> Any:
    return transformers.Gemma3TextConfig(**SIZES, **_WINDOW, query_pre_attn_scalar=12, **kwargs)


def _gemma3() -> PreTrainedModel:
    return transformers.Gemma3ForCausalLM(_gemma3_text())


def _gemma3_vision() -> PreTrainedModel:
    vision = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=6, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.Gemma3Config(
        text_config=_gemma3_text(),
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=511,
        boi_token_index=510,
        eoi_token_index=509,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


_GPT = {"n_embd": 48, "n_inner": 96, "n_head": 4, "n_layer": 4, "n_positions": _TABLE, **_IDS, **_WIDE}

# By model_type, and "gemma3" as the class that the automatic one returns for a model with a vision tower.
MAKERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _of("Llama", SIZES, num_hidden_layers=4),
    "mistral": _of("Mistral", SIZES, num_hidden_layers=3, sliding_window=12),
    "qwen2": _of("Qwen2", SIZES, num_hidden_layers=8, use_sliding_window=True, sliding_window=12, max_window_layers=4),
    "qwen3": _of("Qwen3", SIZES, _HEAD, num_hidden_layers=4),
    "gemma3": _gemma3,
    "gemma3_vision": _gemma3_vision,
    "mixtral": _of("Mixtral", SIZES, _EXPERTS, num_local_experts=4),
    "qwen2_moe": _of("Qwen2Moe", SIZES, _EXPERTS, num_experts=4, shared_expert_intermediate_size=32),
    "qwen3_moe": _of("Qwen3Moe", SIZES, _HEAD, _EXPERTS, num_experts=4),
    "qwen3_next": _of(
        "Qwen3Next",
        SIZES,
        _HEAD,
        _LINEAR,
        _EXPERTS,
        num_hidden_layers=4,
        linear_value_head_dim=12,
        num_experts=4,
        shared_expert_intermediate_size=32,
    ),
    "qwen3_5": _of("Qwen3_5", SIZES, _HEAD, _LINEAR, num_hidden_layers=4, linear_value_head_dim=12),
    "gemma": _of("Gemma", SIZES, _HEAD, num_hidden_layers=4),
    "gemma2": _of("Gemma2", SIZES, _WINDOW, query_pre_attn_scalar=12, final_logit_softcapping=3.0),
    "gemma4": _of(
        "Gemma4", SIZES, _WINDOW, global_head_dim=12, vocab_size_per_layer_input=512, hidden_size_per_layer_input=8
    ),
    "phi": _of("Phi", SIZES, num_key_value_heads=4, num_hidden_layers=4),
    "phi3": _of("Phi3", SIZES, num_hidden_layers=4),
    "gpt2": _of("GPT2", _GPT, head="LMHeadModel"),
    "gpt_neo": _of(
        "GPTNeo",
        _IDS,
        _WIDE,
        hidden_size=48,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=12,
        max_position_embeddings=_TABLE,
    ),
    "gpt_neox": _of("GPTNeoX", SIZES, num_key_value_heads=4, num_hidden_layers=4),
    "opt": _of(
        "OPT",
        _IDS,
        hidden_size=48,
        ffn_dim=96,
        word_embed_proj_dim=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=_TABLE,
        init_std=0.2,
    ),
    "bloom": _of("Bloom", _IDS, _WIDE, hidden_size=48, n_layer=4, n_head=4),
    "falcon": _of("Falcon", SIZES, num_hidden_layers=4),
    "biogpt": _of("BioGpt", SIZES, num_key_value_heads=4, num_hidden_layers=4, max_position_embeddings=_TABLE),
    "olmo": _of("Olmo", SIZES, num_hidden_layers=4),
    "olmo2": _of("Olmo2", SIZES, num_hidden_layers=4),
    "olmoe": _of("Olmoe", SIZES, _EXPERTS, num_experts=4),
    "smollm3": _of("SmolLM3", SIZES, num_hidden_layers=4),
    "granite": _of(
        "Granite",
        SIZES,
        num_hidden_layers=4,
        logits_scaling=2.0,
        residual_multiplier=0.5,
        embedding_multiplier=3.0,
        attention_multiplier=0.1,
    ),
    "granitemoehybrid": _of(
        "GraniteMoeHybrid",
        SIZES,
        _STATES,
        num_hidden_layers=4,
        layer_types=["mamba", "attention"] * 2,
        num_local_experts=0,
        shared_intermediate_size=96,
        logits_scaling=2.0,
    ),
    "cohere2": _of("Cohere2", SIZES, num_hidden_layers=4, logit_scale=0.25, sliding_window=12),
    "stablelm": _of("StableLm", SIZES, num_hidden_layers=4, partial_rotary_factor=0.5),
    "starcoder2": _of("Starcoder2", SIZES, num_hidden_layers=4),
    "glm4_moe": _of("Glm4Moe", SIZES, _HEAD, _EXPERTS, _ROUTED),
    "deepseek_v3": _of("DeepseekV3", SIZES, _EXPERTS, _ROUTED, _LATENT, num_key_value_heads=4),
    "gpt_oss": _of("GptOss", SIZES, _HEAD, _EXPERTS, num_local_experts=4, sliding_window=12),
    "llama4": _of(
        "Llama4",
        SIZES,
        _HEAD,
        num_hidden_layers=4,
        intermediate_size_mlp=96,
        num_local_experts=2,
        attention_chunk_size=12,
        no_rope_layer_interval=2,
    ),
    "lfm2": _of("Lfm2", SIZES, num_hidden_layers=4, full_attn_idxs=[1, 3]),
}

# What is refused, and where: each is the example of one refusal.
REFUSED: dict[str, Callable[[], PreTrainedModel]] = {
    "mamba": _of("Mamba", _IDS, _WIDE, hidden_size=48, num_hidden_layers=4, state_size=8),
    "t5": _of("T5", _IDS, d_model=48, d_ff=96, d_kv=12, num_layers=2, num_heads=4, head="ForConditionalGeneration"),
    "minicpm3": _of("MiniCPM3", SIZES, _LATENT, num_key_value_heads=4, num_hidden_layers=4),
    "falcon_h1": _of("FalconH1", SIZES, _HEAD, _STATES, num_hidden_layers=4, mamba_d_ssm=96),
}  # fmt: skip
