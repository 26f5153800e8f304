"""Small random configurations of the architectures of transformers, drawn by seed.

What architectures share is drawn once, by the names that configurations use: sizes, layers, heads (sizes that are no multiple of 8
among them), key-value heads, tied heads, biases, windows, no token for padding, a vocabulary larger than the tokenizer's. A field goes
to every configuration that has it. `ARCHITECTURES` adds what one architecture has alone: experts, soft caps, scalings, state sizes.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Task: TypeAlias = Literal["language", "text", "classes"]  # completions, whole texts of very different lengths, labels
Fields: TypeAlias = dict[str, Any]
Draw: TypeAlias = Callable[[random.Random, Fields], Fields]  # the fields of one architecture, from the shared ones

TOKENS = (1, 2, 3)  # of padding, beginning and end
PADS = ("roberta", "xlm-roberta", "camembert")  # transformers counts their positions from the token for padding


def _nothing(_chosen: random.Random, _shared: Fields) -> Fields:
    return {}


@dataclass(frozen=True, slots=True)
class Architecture:
    """The way to draw configurations of one architecture."""

    model_type: str
    draw: Draw = _nothing
    task: Task = "language"
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the selection, beside the defaults
    refused: str = ""  # part of the line that refuses all of them


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration, and the settings to train it with."""

    architecture: str
    seed: int
    config: Any  # transformers.PreTrainedConfig
    task: Task
    settings: Fields
    ranks: tuple[int, int]
    pads: bool  # whether model and tokenizer have a token for padding
    traits: tuple[str, ...]  # for the table


def draw_shared_fields(chosen: random.Random, vocabulary: int) -> Fields:
    """Draw the fields that most configurations have, under their usual names."""
    heads = chosen.choice((2, 4))
    head = chosen.choice((4, 6, 8, 8, 10, 12, 16))
    return {
        "vocab_size": vocabulary + chosen.choice((0, 0, 1, 13, 64)),
        "hidden_size": heads * head,
        "head_dim": chosen.choice((head, head, 8, 12)),
        "intermediate_size": chosen.choice((24, 40, 48, 72)),
        "num_hidden_layers": chosen.choice((1, 2, 2, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": chosen.choice([count for count in (1, 2, 4) if heads % count == 0]),
        "max_position_embeddings": 128,
        "tie_word_embeddings": chosen.random() < 0.5,
        "attention_bias": chosen.random() < 0.5,
        "mlp_bias": chosen.random() < 0.5,
        "initializer_range": 0.2,
        "sliding_window": chosen.choice((8, 8, 64)),
    }


def make_case(name: str, seed: int, vocabulary: int) -> Case:
    """Draw configuration number `seed` of an architecture, for a tokenizer of `vocabulary` tokens."""
    architecture = ARCHITECTURES[name]
    chosen = random.Random(f"{name} {seed}")
    shared = draw_shared_fields(chosen, vocabulary)
    pads = chosen.random() < 0.7 or architecture.model_type in PADS
    special = dict(
        zip(("pad_token_id", "bos_token_id", "eos_token_id"), (TOKENS[0] if pads else None, *TOKENS[1:]), strict=True)
    )
    kind = CONFIG_MAPPING[architecture.model_type]
    config = make_config(kind, shared | special, architecture.draw(chosen, shared))
    settings = dict(architecture.settings)
    layers = _count_layers(config)
    if not architecture.refused and layers > 1 and chosen.random() < 0.3 and "layers_to_transform" not in settings:
        settings["layers_to_transform"] = (layers - 1,)
    first, second = chosen.sample((1, 2, 3), 2)
    return Case(
        name,
        seed,
        config,
        architecture.task,
        settings,
        (first, second),
        pads,
        _find_traits(config, shared, vocabulary, pads, settings),
    )


def make_config(kind: Any, shared: Fields, extra_fields: Fields) -> Any:
    """Make a configuration with the shared fields that its class accepts and with fields of its own; dropout is off."""
    field_names = {config_field.name for config_field in dataclasses.fields(kind)} | set(kind.attribute_map)
    aliases = {alias: value for name, value in shared.items() for alias in ALIASES.get(name, ())}
    overridden = {*extra_fields, *(name for name, real in kind.attribute_map.items() if real in extra_fields)}
    accepted = {name: value for name, value in (shared | aliases).items() if name in field_names - overridden}
    for name in ("type_vocab_size",):
        if name in field_names and name not in extra_fields:
            accepted[name] = 2
    return kind(**accepted, **extra_fields)


# Other names of shared fields, beside those that a configuration maps itself.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("dim",),
    "intermediate_size": ("ffn_dim", "n_inner", "ffn_hidden_size", "hidden_dim"),
    "num_hidden_layers": ("num_layers", "n_layers"),
    "num_attention_heads": ("n_heads",),
    "num_key_value_heads": ("num_kv_heads",),
    "initializer_range": ("init_std",),
    "max_position_embeddings": ("max_seq_len", "n_positions"),
    "attention_bias": ("use_bias", "bias", "use_qkv_bias", "attn_bias"),
}


def _count_layers(config: Any) -> int:
    num_layers = getattr(config, "num_hidden_layers", 1)
    return num_layers if isinstance(num_layers, int) else 1


def _find_traits(config: Any, shared: Fields, vocabulary: int, pads: bool, settings: Fields) -> tuple[str, ...]:
    """Return the unusual properties of a configuration, in the words of the table."""
    window = getattr(config, "sliding_window", None)
    head = getattr(config, "head_dim", None) or shared["hidden_size"] // shared["num_attention_heads"]
    experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    traits = {
        "tied": bool(getattr(config, "tie_word_embeddings", False)),
        "untied": not getattr(config, "tie_word_embeddings", False),
        "window": isinstance(window, int) and window < 32,
        "biases": any(
            getattr(config, name, False) is True for name in ("attention_bias", *ALIASES["attention_bias"], "mlp_bias")
        ),
        "no padding token": not pads,
        "larger vocabulary": getattr(config, "vocab_size", vocabulary) != vocabulary,
        "odd head": isinstance(head, int) and head % 8 != 0,
        "soft caps": any(getattr(config, name, None) for name in ("final_logit_softcapping", "attn_logit_softcapping")),
        "experts": experts,
        "last layer": bool(settings.get("layers_to_transform")),
    }
    return tuple(name for name, holds in traits.items() if holds)


def make_model(case: Case, classes: int) -> Any:
    """Make the random model of a case, the same on every call; for an architecture of neither task, any model class of transformers."""
    import torch

    torch.manual_seed(case.seed)
    config = case.config
    if case.task == "classes" and type(config) in AutoModelForSequenceClassification._model_mapping:
        config.num_labels = classes
        return AutoModelForSequenceClassification.from_config(config)
    if type(config) in AutoModelForCausalLM._model_mapping and not getattr(config, "is_encoder_decoder", False):
        return AutoModelForCausalLM.from_config(config)
    return AutoModel.from_config(config)


def _draw_experts(**names: str) -> Draw:
    """Draw four experts, two of them active per token, under the names of an architecture."""

    def draw(chosen: random.Random, _: Fields) -> Fields:
        values = {"count": 4, "per_token": chosen.choice((1, 2)), "width": chosen.choice((12, 24))}
        return {name: values[value] for name, value in names.items()}

    return draw


def _combine_draws(*draws: Draw) -> Draw:
    def draw(chosen: random.Random, shared: Fields) -> Fields:
        fields: Fields = {}
        for draw_fields in draws:
            fields |= draw_fields(chosen, shared)
        return fields

    return draw


def _fixed(**fields: Any) -> Draw:
    return lambda _random, _shared: dict(fields)


def _no_window(chosen: random.Random, shared: Fields) -> Fields:
    return {"sliding_window": chosen.choice((None, shared["sliding_window"]))}


def _draw_logit_caps(chosen: random.Random, shared: Fields) -> Fields:
    """Draw the fields of Gemma 2 and 3: caps of logits, and the scalar of queries."""
    return {
        "query_pre_attn_scalar": chosen.choice((8, shared["head_dim"])),
        "final_logit_softcapping": chosen.choice((None, 5.0, 30.0)),
        "attn_logit_softcapping": chosen.choice((None, 5.0, 50.0)),
    }


def _granite(chosen: random.Random, _: Fields) -> Fields:
    return {
        "logits_scaling": chosen.choice((1.0, 4.0)),
        "residual_multiplier": chosen.choice((1.0, 0.5)),
        "embedding_multiplier": chosen.choice((1.0, 3.0)),
        "attention_multiplier": chosen.choice((1.0, 0.3)),
    }


def _draw_latent_attention(chosen: random.Random, shared: Fields) -> Fields:
    """Draw attention through a latent space, and experts after a first dense block (DeepSeek)."""
    return {
        "q_lora_rank": chosen.choice((None, 12)),
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "head_dim": 4,
        "num_key_value_heads": shared["num_attention_heads"],
        "qk_nope_head_dim": chosen.choice((4, 6)),
        "v_head_dim": chosen.choice((4, 6)),
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": chosen.choice((1, 2)),
        "moe_intermediate_size": 12,
    }


def _draw_partial_rotary(chosen: random.Random, shared: Fields) -> Fields:
    """Draw heads of which a half or a quarter is rotated."""
    return {
        "hidden_size": shared["num_attention_heads"] * chosen.choice((8, 16)),
        "qk_layernorm": chosen.random() < 0.5,
    }


def _square(_: random.Random, shared: Fields) -> Fields:
    return {"head_dim": shared["hidden_size"] // shared["num_attention_heads"]}


HALVES = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}


QWEN_MOE = {"num_experts": "count", "num_experts_per_tok": "per_token", "moe_intermediate_size": "width"}
MIXTRAL = {"num_local_experts": "count", "num_experts_per_tok": "per_token"}
MAMBA = {"state_size": 4, "time_step_rank": 4, "conv_kernel": 4}

_ALL = (
    Architecture("llama"),
    Architecture("mistral", _no_window),
    Architecture("mixtral", _draw_experts(**MIXTRAL)),
    Architecture("ministral"),
    Architecture("qwen2", lambda chosen, _: {"use_sliding_window": chosen.random() < 0.5, "max_window_layers": 1}),
    Architecture("qwen3"),
    Architecture("qwen2_moe", _combine_draws(_draw_experts(**QWEN_MOE), _fixed(shared_expert_intermediate_size=24)), settings={"exclude_modules": ("shared_expert_gate",)}),
    Architecture("qwen3_moe", _combine_draws(_draw_experts(**QWEN_MOE), lambda chosen, _: {"norm_topk_prob": chosen.random() < 0.5})),
    Architecture("gemma"),
    Architecture("gemma2", _draw_logit_caps),
    Architecture("gemma3_text", _draw_logit_caps),
    Architecture("phi", _draw_partial_rotary),
    Architecture("phi3"),
    Architecture("phimoe", _draw_experts(**MIXTRAL), settings={"exclude_modules": ("router",)}),
    Architecture("gpt2", lambda chosen, _: {"scale_attn_by_inverse_layer_idx": chosen.random() < 0.5}),
    Architecture("gpt_neo", lambda _chosen, shared: {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": shared["sliding_window"]}),
    Architecture("gpt_neox", lambda chosen, _: {"use_parallel_residual": chosen.random() < 0.5}),
    Architecture("gptj", _fixed(rotary_dim=4)),
    Architecture("gpt_bigcode", lambda chosen, _: {"multi_query": chosen.random() < 0.5}),
    Architecture("codegen", lambda _chosen, _shared: {"rotary_dim": 4, "n_embd": 32, "n_head": 4}),
    Architecture("opt", lambda chosen, shared: {"do_layer_norm_before": chosen.random() < 0.5, "word_embed_proj_dim": chosen.choice((16, shared["hidden_size"]))}),
    Architecture("bloom", lambda chosen, _: {"apply_residual_connection_post_layernorm": chosen.random() < 0.5}),
    Architecture("falcon", lambda chosen, _: {"new_decoder_architecture": chosen.random() < 0.5, "alibi": chosen.random() < 0.3, "parallel_attn": chosen.random() < 0.5}),
    Architecture("mpt", lambda _chosen, shared: {"d_model": shared["hidden_size"]}),
    Architecture("stablelm", _combine_draws(_draw_partial_rotary, lambda chosen, _: {"use_parallel_residual": chosen.random() < 0.5})),
    Architecture("olmo", lambda chosen, _: {"clip_qkv": chosen.choice((None, 1.0))}),
    Architecture("olmo2"),
    Architecture("olmo3"),
    Architecture("olmoe", _draw_experts(num_experts="count", num_experts_per_tok="per_token")),
    Architecture("granite", _granite),
    Architecture("granitemoe", _combine_draws(_granite, _draw_experts(**MIXTRAL))),
    Architecture("cohere", lambda chosen, _: {"logit_scale": chosen.choice((0.0625, 1.0)), "use_qk_norm": chosen.random() < 0.5}),
    Architecture("cohere2", lambda chosen, _: {"logit_scale": chosen.choice((0.0625, 1.0))}),
    Architecture("deepseek_v2", _draw_latent_attention),
    Architecture("deepseek_v3", _draw_latent_attention),
    Architecture("gpt_oss", _draw_experts(**MIXTRAL)),
    Architecture("smollm3", lambda chosen, _: {"no_rope_layer_interval": chosen.choice((2, 4))}),
    Architecture("starcoder2", _no_window),
    Architecture("nemotron"),
    Architecture("glm"),
    Architecture("glm4"),
    Architecture("exaone4"),
    Architecture("ernie4_5"),
    Architecture("helium", _square),
    Architecture("arcee"),
    Architecture("seed_oss"),
    Architecture("apertus"),
    Architecture("persimmon", _draw_partial_rotary),
    Architecture("xglm"),
    Architecture("biogpt"),
    Architecture("lfm2", lambda _chosen, _shared: {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}),
    Architecture("jamba", _combine_draws(_draw_experts(num_experts="count", num_experts_per_tok="per_token"), _fixed(use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2))),
    Architecture("recurrent_gemma", lambda _chosen, shared: {"lru_width": shared["hidden_size"], "num_hidden_layers": 3}),
    Architecture("mamba", _fixed(**MAMBA)),
    Architecture("falcon_mamba", _fixed(**MAMBA)),
    Architecture("mamba2", _fixed(state_size=4, num_heads=4, head_dim=8, hidden_size=16, n_groups=1, chunk_size=8)),
    Architecture("bert", task="classes"),
    Architecture("roberta", task="classes"),
    Architecture("xlm-roberta", task="classes"),
    Architecture("camembert", task="classes"),
    Architecture("electra", lambda _chosen, shared: {"embedding_size": shared["hidden_size"]}, task="classes"),
    Architecture("albert", _fixed(embedding_size=16), "classes", {"layers_to_transform": None}),  # all its layers are one
    Architecture("distilbert", task="classes"),
    Architecture("mpnet", task="classes"),
    Architecture("modernbert", _fixed(local_attention=8), task="classes"),
    Architecture("deberta", lambda chosen, _: {"relative_attention": chosen.random() < 0.7, "pos_att_type": ["c2p", "p2c"]}, task="classes"),
    Architecture("deberta-v2", lambda chosen, _: {"relative_attention": chosen.random() < 0.7, "pos_att_type": ["c2p", "p2c"]}, task="classes"),
    Architecture("vit", refused="'vit' is no causal language model"),
    Architecture("t5", _fixed(d_kv=8), refused="an encoder-decoder model such as T5"),
    Architecture("mt5", _fixed(d_kv=8), refused="an encoder-decoder model such as T5"),
    Architecture("bart", _fixed(**HALVES), refused="an encoder-decoder model such as T5"),
    Architecture("whisper", _fixed(**HALVES), refused="an encoder-decoder model such as T5"),
    Architecture("clip", refused="'clip' is no causal language model"),
    Architecture("wav2vec2", _fixed(num_conv_pos_embedding_groups=2), refused="'wav2vec2' is no causal language model"),
    Architecture("big_bird", refused="it sees the tokens that follow"),
    Architecture("rembert", refused="it sees the tokens that follow"),
    Architecture("roformer", refused="it sees the tokens that follow"),
    Architecture("megatron-bert", refused="it sees the tokens that follow"),
    Architecture("xlnet", _fixed(d_model=32, n_head=4, d_head=8, d_inner=48), refused="it sees the tokens that follow"),
    Architecture("xlm", refused="it sees the tokens that follow"),
)  # fmt: skip
_DRAWS = {architecture.model_type: architecture.draw for architecture in _ALL} | {
    "llama4_text": _fixed(num_local_experts=4, intermediate_size_mlp=48)
}
_CLASSIFIERS = ("llama", "qwen2", "gpt2", "mistral", "gemma2", "phi3", "opt", "mixtral")
_REFUSED = {  # as language models
    "bert": "it sees the tokens that follow",
    "roberta": "it sees the tokens that follow",
    "electra": "it sees the tokens that follow",
    "llama4_text": "which returns more than its product",
    "phimoe": "which returns more than its product",
    "qwen2_moe": "is above the 1 that",
}
ARCHITECTURES: Mapping[str, Architecture] = (
    {architecture.model_type: architecture for architecture in _ALL}
    | {
        f"{architecture.model_type}, text": replace(architecture, task="text")
        for architecture in _ALL
        if architecture.task == "language" and not architecture.refused
    }
    | {
        f"{architecture.model_type}, classes": replace(architecture, task="classes")
        for architecture in _ALL
        if architecture.model_type in _CLASSIFIERS
    }
    | {f"{name}, refused": Architecture(name, _DRAWS[name], refused=reason) for name, reason in _REFUSED.items()}
)
