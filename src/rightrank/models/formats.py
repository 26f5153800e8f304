"""Whole models in the formats of llama.cpp (GGUF) and of mlx-lm: written from a model in memory, and MLX read back as PyTorch reads.

GGUF: matrices in one of `GGUF_TYPES`, the embedding and the output head in 8 bits beside 4 and 5, vectors in float32. The package `gguf`
writes these types itself; the K-quants are llama.cpp's alone (`llama-quantize` makes them of an f16 file).

MLX: w = scale · q + bias in groups of 64 values of a row, q in 4 or 8 bits, packed into words of 32 bits, the lowest bits first.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rightrank.data.files import read_json_object
from rightrank.models.places import is_mlx, safe_shards
from rightrank.schema.errors import MissingExtraError, ModelError

SHORT = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
GGUF_TYPES = (*SHORT, "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
MLX_TYPES = (*SHORT, "q8", "q4")
MLX_GROUP = 64
WEIGHTS = "model.safetensors"
# By transformers' name of the architecture, llama.cpp's; of others, tensors are stored in ways of their own.
GGUF_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
OWN_SCRIPT = "export --to merged, and convert its folder with llama.cpp's convert_hf_to_gguf.py"
# llama.cpp's name of how text is split before byte pairs are merged, by a part of the expression that splits it.
SPLITS = (("\\p{N}{1,3}", "llama-bpe"), ("\\p{L}+|\\p{N}|", "qwen2"), ('"individual_digits": true', "smollm"))
CONTROL, USER_DEFINED, NORMAL, UNUSED = 3, 4, 1, 5  # kinds of tokens in GGUF


def write_gguf(model: Any, tokenizer: Any, file: Path, kind: str) -> None:
    """Write a causal model and its tokenizer as one GGUF file.

    Raises:
        ModelError: an architecture, a rotary scaling or a tokenizer that this does not write.
        MissingExtraError: without the package `gguf`.
    """
    if find_spec("gguf") is None:
        raise MissingExtraError("writing GGUF files needs the `gguf` package: pip install 'rightrank[gguf]'")
    import gguf

    config, name = model.config, GGUF_ARCHITECTURES.get(model.config.model_type)
    rotary = getattr(config, "rope_parameters", None) or {}
    if name is None or "ForCausalLM" not in type(model).__name__:
        raise ModelError(
            f"{type(model).__name__} is not written as GGUF ({', '.join(GGUF_ARCHITECTURES)} are); {OWN_SCRIPT}"
        )
    if rotary.get("rope_type", "default") != "default":
        raise ModelError(f"the rotary scaling {rotary['rope_type']!r} is not written as GGUF; {OWN_SCRIPT}")
    vocabulary = _vocabulary(tokenizer, config.vocab_size)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer = gguf.GGUFWriter(file, name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rotary.get("rope_theta", 10_000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for add, value in vocabulary.items():
        getattr(writer, add)(value)
    architecture = next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if (renamed := names.get_name(key, try_suffixes=(".weight", ".bias"))) is None:
            raise ModelError(f"{key} has no name in GGUF; {OWN_SCRIPT}")
        tensor = value.detach().float().cpu()
        if name == "llama" and (count := {"attn_q": heads, "attn_k": groups}.get(renamed.split(".")[-2])):
            # llama.cpp rotates neighbouring values, transformers the two halves of a head.
            tensor = tensor.reshape(count, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        stored = gguf.GGMLQuantizationType[_stored_as(kind, renamed, tensor).upper()]
        writer.add_tensor(renamed, gguf.quants.quantize(tensor.contiguous().numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _stored_as(kind: str, name: str, tensor: torch.Tensor) -> str:
    """The type of a tensor in a file of `kind`."""
    if tensor.dim() == 1:
        return "f32"
    if kind.startswith("q") and tensor.shape[-1] % 32:  # values of a block
        return "f16"
    return "q8_0" if kind[:2] in ("q4", "q5") and "blk." not in name else kind


def _vocabulary(tokenizer: Any, size: int) -> dict[str, Any]:
    """By the method of GGUF's writer, what the file says of the tokenizer.

    Raises:
        ModelError: a tokenizer that is not of byte pairs, or that splits text in a way that has no name in llama.cpp.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = json.loads(backend.to_str()) if backend is not None else {}
    pieces, splits = (
        whole.get("model", {}),
        json.dumps(whole.get("pre_tokenizer"), ensure_ascii=False).replace("\\\\", "\\"),
    )
    if pieces.get("type") != "BPE" or "ByteLevel" not in splits:
        raise ModelError(f"the tokenizer ({type(tokenizer).__name__}) is not of byte pairs; {OWN_SCRIPT}")
    if "Split" in splits and not any(part in splits for part, _ in SPLITS):
        raise ModelError(f"the tokenizer splits text in a way that is not known here; {OWN_SCRIPT}")
    added = {token["id"]: token for token in whole["added_tokens"]}
    by_number = {number: token for token, number in tokenizer.get_vocab().items()}
    ids = range(size)
    fields = {
        "add_tokenizer_model": "gpt2",
        "add_tokenizer_pre": next((known for part, known in SPLITS if part in splits), "gpt-2"),
        "add_token_list": [by_number.get(number, f"[PAD{number}]") for number in ids],
        "add_token_types": [
            (CONTROL if added[number]["special"] else USER_DEFINED) if number in added
            else NORMAL if number in by_number else UNUSED
            for number in ids
        ],
        "add_token_merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in pieces["merges"]],
        "add_bos_token_id": tokenizer.bos_token_id,
        "add_eos_token_id": tokenizer.eos_token_id,
        "add_unk_token_id": tokenizer.unk_token_id,
        "add_pad_token_id": tokenizer.pad_token_id,
        "add_add_bos_token": tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id,
        "add_add_space_prefix": False,
        "add_chat_template": tokenizer.chat_template,
    }  # fmt: skip
    return {add: value for add, value in fields.items() if value is not None}


def write_mlx(model: Any, tokenizer: Any, folder: Path, kind: str) -> None:
    """Write a model and its tokenizer as `mlx_lm.load` reads them; `q8` and `q4` are quantised in groups.

    Raises:
        ModelError: no causal model.
    """
    if "ForCausalLM" not in type(model).__name__:
        raise ModelError(f"{type(model).__name__} is not written for MLX: mlx-lm loads causal models")
    bits = int(kind[1:]) if kind.startswith("q") else None
    dtype = getattr(torch, SHORT.get(kind, "float16"))
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    }
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if bits is None or key not in matrices or value.shape[1] % MLX_GROUP:
            tensors[key] = value.detach().to(dtype).contiguous().cpu()
        else:
            tensors |= _packed(key.removesuffix(".weight"), value.detach().float().cpu(), bits, dtype)
    save_file(tensors, folder / WEIGHTS, {"format": "mlx"})
    if bits is not None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        quantisation = {"group_size": MLX_GROUP, "bits": bits, "mode": "affine"}
        (folder / "config.json").write_text(
            json.dumps(config | {"quantization": quantisation}, indent=2) + "\n", encoding="utf-8"
        )


def _packed(name: str, matrix: torch.Tensor, bits: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The three tensors of a quantised matrix [rows, columns]."""
    groups = matrix.reshape(len(matrix), -1, MLX_GROUP)
    low, high = groups.amin(-1, keepdim=True).to(dtype), groups.amax(-1, keepdim=True).to(dtype)
    scales = ((high.float() - low.float()) / (2**bits - 1)).clamp(min=1e-7).to(dtype)
    q = (
        ((groups - low.float()) / scales.float())
        .round()
        .clamp(0, 2**bits - 1)
        .long()
        .reshape(len(matrix), -1, 32 // bits)
    )
    words = (q << torch.arange(0, 32, bits)).sum(-1)
    return {
        f"{name}.weight": words.to(torch.uint32),
        f"{name}.scales": scales.squeeze(-1).contiguous(),
        f"{name}.biases": low.squeeze(-1).contiguous(),
    }


@contextmanager
def torch_folder(place: str) -> Iterator[str]:
    """The model's place itself; of a folder that MLX quantised, in the block a copy whose matrices are those that MLX computes with."""
    if not is_mlx(Path(place)):
        yield place
        return
    folder = Path(place)
    config = read_json_object(folder / "config.json")
    settings = config.pop("quantization")
    config.pop("quantization_config", None)
    tensors = {key: value for shard in safe_shards(folder) for key, value in load_file(shard).items()}
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        copy = Path(name) / folder.name
        copy.mkdir()
        for file in folder.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
                shutil.copy2(file, copy)
        (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(_unpacked(folder, tensors, settings), copy / WEIGHTS, {"format": "pt"})
        yield str(copy)


def _unpacked(
    folder: Path, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The tensors with every quantised matrix as the product of its scales.

    Raises:
        ModelError: another way of quantising than `affine`, or matrices with settings of their own.
    """
    mixed = [name for name, value in settings.items() if isinstance(value, dict)]
    if settings.get("mode", "affine") != "affine" or mixed:
        what = f"matrices with bits of their own ({mixed[0]}, …)" if mixed else f"mode {settings['mode']!r}"
        raise ModelError(
            f"{folder}: quantised by MLX with {what}, which is not read here; give one of mlx_lm.convert's defaults"
        )
    bits, size = int(settings["bits"]), int(settings["group_size"])
    unpacked: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        name = key.removesuffix(".weight")
        if key.endswith((".scales", ".biases")) and f"{key.rsplit('.', 1)[0]}.weight" in tensors:
            continue
        if f"{name}.scales" in tensors and value.dtype == torch.uint32:
            scales, biases = (tensors[f"{name}.{part}"].float()[..., None] for part in ("scales", "biases"))
            q = (value.long()[..., None] >> torch.arange(0, 32, bits)) & (2**bits - 1)
            value = (q.reshape(*scales.shape[:-1], size) * scales + biases).reshape(len(value), -1)
        unpacked[key] = value.contiguous()
    return unpacked
