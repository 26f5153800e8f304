"""Test the end of a training of a vision-language model: SFTTrainer with images, and LoRA on vision tower, projector and language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

from rightrank import SmallestAdapter, resize
from rightrank.schema.errors import InputError
from rightrank.trainers.trainer_batches import hash_inputs
from tests.tiny import SIZES, generate_sentences, make_tokenizer, write_jsonl

Image = pytest.importorskip("PIL.Image")
pytestmark = [pytest.mark.trains, pytest.mark.filterwarnings("ignore")]
SIDE = 16  # pixels


def make_processor() -> Any:
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor

    longest = {"longest_edge": SIDE}
    images = Idefics3ImageProcessorPil(size=longest, max_image_size=longest, do_image_splitting=False)
    return Idefics3Processor(images, make_tokenizer(), image_seq_len=4)


def save_model(folder: Path, processor: Any) -> Path:
    """Save a random model of the architecture of SmolVLM: the tower's 16 patches become four tokens."""
    torch.manual_seed(0)
    text = SIZES | {"model_type": "llama", "vocab_size": len(processor.tokenizer)}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Idefics3Config(
        image_token_id=processor.image_token_id, scale_factor=2, pad_token_id=1, text_config=text,
        vision_config=vision | {"image_size": SIDE, "patch_size": 4},
    )  # fmt: skip
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_image(seed: int) -> Any:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))


def make_rows(count: int) -> list[dict[str, Any]]:
    """Make rows with one prompt, so that rows with equal completions differ only in their images."""
    completions = generate_sentences(8, seed=3)
    return [
        {"prompt": "<image> : ", "completion": completions[number % 8], "images": [make_image(number)]}
        for number in range(count)
    ]


def make_trainer(folder: Path, processor: Any, out: Path) -> Any:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    rows = make_rows(56)
    arguments = trl.SFTConfig(
        output_dir=str(out), max_steps=4, per_device_train_batch_size=8, learning_rate=1e-2, max_length=None, bf16=False,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = trl.SFTTrainer(
        Idefics3ForConditionalGeneration.from_pretrained(folder),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows[:24]),
        eval_dataset=datasets.Dataset.from_list(rows[24:] + rows[:2]),
        processing_class=processor,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False),
    )
    trainer.add_callback(SmallestAdapter(trainer, margin=0.5))
    return trainer


def compute_loss(folder: Path, adapter: Path, trainer: Any) -> float:
    """Return the mean held-out loss of an adapter that PEFT loads, over tokens, with the trainer's collator."""
    model = PeftModel.from_pretrained(Idefics3ForConditionalGeneration.from_pretrained(folder), adapter).eval()
    total = count = 0.0
    for row in trainer.eval_dataset.select(range(32)):
        batch = trainer.data_collator([row])
        labels = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(**batch).loss) * labels
        count += labels
    return total / count


def test_the_end_of_a_training_with_images(tmp_path: Path) -> None:
    """Load the handed-over adapter by PEFT, and compute its loss with the trainer's batches."""
    processor = make_processor()
    folder = save_model(tmp_path / "base", processor)
    trainer = make_trainer(folder, processor, tmp_path / "out")
    trainer.train()
    callback = trainer.callback_handler.callbacks[0]
    assert callback.result is not None
    answer = callback.result.answer
    assert any("2 of 34 held-out rows are also in the training set" in note for note in answer.notes)
    assert len(callback.result.trained_scores.losses) == 32
    assert answer.rank < 8

    adapter = tmp_path / "out" / "rightrank" / "adapter"
    value = callback.result.trained_scores.loss
    assert compute_loss(folder, adapter, trainer) == pytest.approx(value + answer.difference, abs=1e-4)

    rows = [{"prompt": "<image> : ", "completion": "the cat", "images": [f"{n}.png"]} for n in range(30)]
    with pytest.raises(InputError, match="column `images`: only text is read here; add SmallestAdapter") as raised:
        resize(adapter, tmp_path / "smaller", data=write_jsonl(tmp_path / "rows.jsonl", rows))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "RGBA"])
def test_rows_that_differ_in_one_pixel_are_different_rows(mode: str) -> None:
    image, changed = make_image(0).convert(mode), make_image(0).convert(mode)
    assert hash_inputs({"images": [image]}, frozenset()) == hash_inputs({"images": [changed]}, frozenset())
    pixel = changed.getpixel((7, 8))
    changed.putpixel((7, 8), tuple(255 - v for v in pixel) if isinstance(pixel, tuple) else 255 - pixel)
    assert hash_inputs({"images": [image]}, frozenset()) != hash_inputs({"images": [changed]}, frozenset())
