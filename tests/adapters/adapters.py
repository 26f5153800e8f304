"""Adapters of every kind on small random base models, with B filled as if it had been trained."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from rightrank.adapters.adapter_folders import MLX_FILE
from tests.tiny import build_tiny_llama_config

VOCABULARY = 400
PEFT = "base_model.model."
MLX: dict[str, Any] = {"fine_tune_type": "lora", "num_layers": 3, "max_seq_length": 64, "seed": 0}
LINEAR = ["q_proj", "v_proj", "down_proj"]

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LINEAR},
    "rslora": {"target_modules": LINEAR, "use_rslora": True},
    "rank_pattern": {
        "target_modules": LINEAR,
        "rank_pattern": {"v_proj": 4, "layers.1.mlp.down_proj": 12},
        "use_rslora": True,
    },
    "alpha_pattern": {"target_modules": LINEAR, "alpha_pattern": {"v_proj": 3, "model.layers.0.self_attn.q_proj": 40}},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "lora_bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "modules_to_save": {"target_modules": LINEAR, "modules_to_save": ["norm"]},
    "bfloat16": {"target_modules": LINEAR},
    "layers": {"target_modules": LINEAR, "layers_to_transform": [1, 2]},
    "conv1d": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
}


def make_base(folder: Path, kind: str = "plain", shard: str = "50GB") -> Path:
    """Save a random Llama, or for `conv1d` a random GPT-2 with its fused c_attn."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        model: Any
        if kind == "conv1d":
            config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64)
            model = GPT2LMHeadModel(config)
        else:
            llama = build_tiny_llama_config(VOCABULARY)
            llama.attention_bias = kind == "lora_bias"
            llama.tie_word_embeddings = kind != "embedding"  # PEFT warns of adapters on tied embeddings as such
            model = LlamaForCausalLM(llama)
        model.save_pretrained(folder, max_shard_size=shard)
    return folder


def load_base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_adapter(base: Path, folder: Path, kind: str = "plain", rank: int = 8, **changes: Any) -> Path:
    """Save an adapter of a kind, with random values in every tensor."""
    options = {"r": rank, "lora_alpha": 16, "task_type": "CAUSAL_LM"} | KINDS[kind] | changes
    torch.manual_seed(0)  # PEFT draws A from the global generator
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on making an adapter; loading one is what the tests watch
        model: Any = get_peft_model(load_base(base), LoraConfig(**options))
        generator = torch.Generator().manual_seed(rank)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        model.save_pretrained(folder, save_embedding_layers=False)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if kind == "bfloat16":
        write_tensors(folder, {key: value.bfloat16() for key, value in load_tensors(folder).items()})
    return folder


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load_strictly(base: Path, adapter: Path) -> Any:
    """Load the PeftModel, with every warning as an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        loaded: Any = PeftModel.from_pretrained(load_base(base), str(adapter))
    return loaded.eval()


def compute_deltas(model: Any) -> dict[str, torch.Tensor]:
    """Return PEFT's own ΔW of every module, without DoRA's magnitudes."""
    return {
        name: module.get_delta_weight("default").detach().double()
        for name, module in model.base_model.model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def compute_logits(model: Any) -> torch.Tensor:
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids).logits
    return result


def write_mlx(folder: Path, adapter: Path, base: Path, **changes: Any) -> Path:
    """Write a PEFT adapter of rank 8 and alpha 16 as mlx-lm stores it."""
    folder.mkdir()
    tensors = {key.removeprefix(PEFT): value for key, value in load_tensors(adapter).items()}
    renamed = {
        key.replace(".lora_A.weight", ".lora_a").replace(".lora_B.weight", ".lora_b"): value.T.contiguous()
        for key, value in tensors.items()
    }
    save_file(renamed, folder / MLX_FILE)
    parameters = {"rank": 8, "scale": 2.0, "dropout": 0.0}
    config = MLX | {"model": str(base), "lora_parameters": parameters} | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
