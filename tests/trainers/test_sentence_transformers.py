"""Test `SmallestAdapter` in the trainers of rerankers and embedding models of sentence-transformers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

from rightrank import SmallestAdapter
from rightrank.evaluation.peft_models import set_update_to_zero
from rightrank.schema.errors import DataError, SettingsError
from rightrank.trainers.trainer_batches import find_adapted_model
from tests.tiny import generate_sentences, make_tokenizer

pytest.importorskip("sentence_transformers")
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

pytestmark = [pytest.mark.trains, pytest.mark.filterwarnings("ignore")]
CONFIG = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], init_lora_weights=False)
RERANKER_CONFIG = LoraConfig(
    r=8, lora_alpha=16, target_modules=["query", "value"], init_lora_weights=False, modules_to_save=["classifier"]
)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random BERT with one output."""
    folder, tokenizer = tmp_path_factory.mktemp("bert"), make_tokenizer()
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, num_labels=1,
        max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_trainer(kind: str, bert: Path, out: Path, *callbacks: Any, rows: int = 100, **changes: Any) -> Any:
    """Return a trainer of a reranker, whose adapter is injected, or of an embedding model, whose adapter PEFT wraps."""
    datasets = pytest.importorskip("datasets")
    texts = generate_sentences(rows, seed=3)
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "use_cpu": True,
    }
    settings |= {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2} | changes
    torch.manual_seed(0)
    if kind == "reranker":
        model: Any = CrossEncoder(str(bert), num_labels=1, device="cpu")
        inject_adapter_in_model(RERANKER_CONFIG, model[0].model)
        table = [{"query": f"text {n // 4}", "document": text, "label": float(n % 2)} for n, text in enumerate(texts)]
        trainer_class: Any = CrossEncoderTrainer
        arguments, loss = CrossEncoderTrainingArguments(**settings), BinaryCrossEntropyLoss(model)
    else:
        model = SentenceTransformer(str(bert), device="cpu")
        model[0].model = get_peft_model(model[0].model, CONFIG)
        table = [{"query": f"text {n}", "document": text} for n, text in enumerate(texts)]
        trainer_class = SentenceTransformerTrainer
        arguments, loss = SentenceTransformerTrainingArguments(**settings), MultipleNegativesRankingLoss(model)
    train, held_out = datasets.Dataset.from_list(table[: rows // 2]), datasets.Dataset.from_list(table[rows // 2 :])
    trainer = trainer_class(model=model, args=arguments, train_dataset=train, eval_dataset=held_out, loss=loss)
    for make_callback in callbacks:
        trainer.add_callback(make_callback(trainer))
    return trainer


@pytest.mark.parametrize("kind", ["reranker", "embedding"])
def test_the_own_loss_of_the_trainer_is_measured(kind: str, bert: Path, tmp_path: Path) -> None:
    """Rows of a pointwise loss are examples, grouped by query. Otherwise an example is a batch. The training stays the same."""
    factors = []
    for callbacks in ((), (partial(SmallestAdapter, margin=0.02),)):
        trainer = make_trainer(kind, bert, tmp_path / str(len(callbacks)), *callbacks)
        trainer.train()
        factors.append([parameter for name, parameter in trainer.model.named_parameters() if "lora_" in name])
    assert all(torch.equal(*pair) for pair in zip(*factors, strict=True))
    result = next(c for c in trainer.callback_handler.callbacks if isinstance(c, SmallestAdapter)).result
    assert result is not None
    assert result.answer.rank <= 8
    adapter = tmp_path / "1" / "rightrank" / "adapter"
    if kind == "embedding":
        assert len(result.trained_scores.losses) == 6  # batches of eight
        base = SentenceTransformer(str(bert), device="cpu")[0].model
        assert PeftModel.from_pretrained(base, adapter).peft_config["default"].r >= 1
        return
    assert len(result.trained_scores.losses) == 50
    assert "Bounds are over 13 groups of 50 examples, which are rough: give 16 groups or more." in result.answer.notes
    assert result.trained_scores.loss == pytest.approx(trainer.evaluate()["eval_loss"], rel=0.02)
    set_update_to_zero(find_adapted_model(trainer.model), "default")  # the head stays the trained one
    base_loss = sum(trainer.evaluate(trainer.eval_dataset.select([n]))["eval_loss"] for n in range(50)) / 50
    assert result.answer.gain.mean == pytest.approx(base_loss - result.trained_scores.loss, abs=1e-4)
    model = CrossEncoder(str(bert), num_labels=1, device="cpu")
    model[0].model = PeftModel.from_pretrained(model[0].model, adapter)
    trainer.model, trainer.loss.model = model, model
    trainer.model_wrapped = model
    mean = sum(trainer.evaluate(trainer.eval_dataset.select([n]))["eval_loss"] for n in range(50)) / 50
    assert mean == pytest.approx(result.trained_scores.loss + result.answer.difference, abs=1e-4)


@pytest.mark.parametrize(
    ("callback", "rows", "error", "words"),
    [
        (partial(SmallestAdapter, metric="accuracy"), 100, SettingsError, "evaluate=evaluate"),
        (
            SmallestAdapter,
            30,
            DataError,
            "each batch of 8 is one example, and 15 held-out queries give 1; give more rows",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    callback: Any, rows: int, error: type[Exception], words: str, bert: Path, tmp_path: Path
) -> None:
    trainer = make_trainer("embedding", bert, tmp_path, callback, rows=rows)
    with pytest.raises(error, match=words) as raised:
        trainer.train()
    assert "\n" not in str(raised.value)
