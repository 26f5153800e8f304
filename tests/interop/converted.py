"""Write models as converters of other projects do: a GGUF file of a small Llama, and a folder quantized by MLX."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file, save_file

GROUP = 64  # values of a row with a scale and a bias in common


def write_gguf(model: Any, tokenizer: Any, file: Path, kind: str) -> Path:
    """Write a Llama with tied embeddings and a byte-pair tokenizer; `kind` is the type of its matrices."""
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokenizer_data = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["id"] for token in tokenizer_data["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_types([3 if number in special else 1 for number in range(len(tokenizer))])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer_data["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        if key == "lm_head.weight":
            continue
        name, tensor = names.get_name(key, try_suffixes=(".weight",)), value.float()
        if count := {"attn_q": heads, "attn_k": groups}.get(name.split(".")[-2]):
            # llama.cpp rotates neighbouring values, transformers the two halves of a head.
            tensor = tensor.reshape(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        stored = gguf.GGMLQuantizationType[(kind if tensor.dim() > 1 else "f32").upper()]
        writer.add_tensor(name, gguf.quants.quantize(tensor.contiguous().numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_mlx(model: Path, folder: Path, bits: int) -> tuple[Path, dict[str, torch.Tensor]]:
    """Quantize the matrices of a model folder. Return the new folder, and the resulting values by name."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization"] = {"group_size": GROUP, "bits": bits, "mode": "affine"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors, values = load_file(folder / "model.safetensors"), {}
    for key, matrix in list(tensors.items()):
        if matrix.dim() == 1:
            continue
        groups = matrix.float().reshape(len(matrix), -1, GROUP)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = (high - low) / (2**bits - 1)
        packed = ((groups - low) / scale).round().long()
        words = packed.reshape(len(matrix), -1, 32 // bits) << torch.arange(0, 32, bits)  # the lowest bits first
        name = key.removesuffix(".weight")
        tensors |= {
            key: words.sum(-1).to(torch.uint32),
            f"{name}.scales": scale.squeeze(-1),
            f"{name}.biases": low.squeeze(-1),
        }
        values[key] = (packed * scale + low).reshape(matrix.shape)
    save_file(tensors, folder / "model.safetensors", {"format": "mlx"})
    return folder, values
