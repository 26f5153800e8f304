"""Test `export --to merged`, and `compare` with merged, converted and quantized models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from rightrank import compare, export
from rightrank.bases.base_models import load_base
from rightrank.schema.errors import DataError, ModelError, SettingsError
from rightrank.schema.results import AdapterComparison
from rightrank.schema.settings import SelectSettings
from tests.adapters.adapters import make_adapter
from tests.tiny import build_tiny_llama_config, generate_sentences, make_tokenizer, write_jsonl

pytestmark = pytest.mark.trains


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


SETTINGS = SelectSettings(seq_len=32, device="cpu", margin=0.05)
ROWS = 40


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random Llama with a tokenizer and its template."""

    folder = tmp_path_factory.mktemp("whole") / "base"
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = build_tiny_llama_config(len(tokenizer))
    config.hidden_size, config.intermediate_size, config.head_dim, config.initializer_range = 64, 128, 16, 0.05
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write conversations, so that the template is part of every example."""
    turns = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": " ".join(text.split()[:3])}]
        for text in generate_sentences(ROWS, seed=5)
    ]
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", [{"messages": turn} for turn in turns])


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return make_adapter(base, tmp_path / "adapter")


def merge_by_hand(base: Path, adapter: Path) -> Any:
    """Merge as PEFT's documentation does."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()


def compare_merged(adapter: Path, merged: Path, base: Path, rows: Path) -> AdapterComparison:
    return compare(adapter, merged, model=str(base), data=rows, settings=SETTINGS)


@pytest.mark.parametrize("kind", ["plain", "rslora", "alpha_pattern", "dora", "modules_to_save"])
def test_a_merged_model_is_that_of_peft(kind: str, base: Path, rows: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", kind)
    result = export(adapter, "merged", tmp_path / "out", check=rows, settings=SETTINGS)
    assert (result.check["verdict"], result.check["cause"]) == ("not_worse", None)
    assert abs(result.check["difference"]) < 1e-5
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    theirs = merge_by_hand(base, adapter).state_dict()
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-5
    assert result.check["sentence"] in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")  # PEFT says so on loading
@pytest.mark.parametrize("value_type", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_of_one_side_of_a_tied_weight_is_not_merged(
    target: str, value_type: str, base: Path, rows: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", target])
    with pytest.raises(
        ModelError, match=r"one weight for its embeddings and its output head, .* use the adapter unmerged$"
    ):
        export(adapter, "merged", tmp_path / "out", check=rows, kind=value_type, settings=SETTINGS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_of_the_head_or_the_embeddings_of_an_untied_base_is_merged(
    target: str, base: Path, rows: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "untied")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "untied")
    adapter = make_adapter(tmp_path / "untied", tmp_path / "adapter", target_modules=["q_proj", target])
    result = export(adapter, "merged", tmp_path / "out", check=rows, settings=SETTINGS)
    assert abs(result.check["difference"]) < 1e-5


@pytest.mark.parametrize("value_type", ["bf16", "f16"])
def test_rounding_to_sixteen_bits_is_no_other_model(
    value_type: str, base: Path, adapter: Path, rows: Path, tmp_path: Path
) -> None:
    result = export(adapter, "merged", tmp_path / "out", check=rows, kind=value_type, settings=SETTINGS)
    assert result.check["verdict"] == "not_worse"


def test_what_is_written_is_read_back(
    base: Path, adapter: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage a weight on its way into the file."""
    save = LlamaForCausalLM.save_pretrained

    def save_damaged(model: Any, folder: Path) -> None:
        model.model.layers[0].mlp.down_proj.weight.data.mul_(1.5)
        save(model, folder)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save_damaged)
    with pytest.raises(ModelError, match="the merged model would differ from the adapter by"):
        export(adapter, "merged", tmp_path / "out", check=rows, settings=SETTINGS)


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_0"])
def test_a_gguf_file_is_read_as_transformers_reads_it(
    kind: str, base: Path, adapter: Path, rows: Path, tmp_path: Path
) -> None:
    merged, tokenizer = merge_by_hand(base, adapter), AutoTokenizer.from_pretrained(base)
    file = write_gguf(merged, tokenizer, tmp_path / "model.gguf", kind)
    answer = compare_merged(adapter, file, base, rows)
    assert answer.cause is None
    assert abs(answer.difference) < {"q4_0": 0.2, "q8_0": 0.02}.get(kind, 0.005)
    read = load_base(str(file), SETTINGS.model_copy(update={"dtype": "float32"}), None)
    assert read.tokenizer.chat_template == tokenizer.chat_template
    assert read.tokenizer("one dog, 12")["input_ids"] == tokenizer("one dog, 12")["input_ids"]
    for name, value in merged.state_dict().items():
        off = torch.linalg.vector_norm(read.model.state_dict()[name] - value) / torch.linalg.vector_norm(value)
        assert float(off) < {"q4_0": 0.15, "q8_0": 0.02}.get(kind, 0.01), name


def drop_adapter(base: Path, adapter: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_a_dropped_adapter_is_broken(kind: str, base: Path, adapter: Path, rows: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    file = write_gguf(drop_adapter(base, adapter), tokenizer, tmp_path / "model.gguf", kind)
    comparison = compare_merged(adapter, file, base, rows)
    assert (comparison.verdict, comparison.cause) == ("broken", "it equals the base model: the adapter was dropped")
    assert "BROKEN" in comparison.sentence


def test_bad_input_is_one_line_and_nothing_is_written(adapter: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(SettingsError, match="--type 'q3': merged can be written as f32, bf16, f16"):
        export(adapter, "merged", out, check=rows, kind="q3", settings=SETTINGS)
    with pytest.raises(DataError, match="give them with --check DATA"):
        export(adapter, "merged", out, settings=SETTINGS)
    assert not out.exists()
    assert not list(tmp_path.glob("*tmp*"))
