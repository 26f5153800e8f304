"""Generation in batches with left padding and a key-value cache equals generation of single prompts without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rightrank.evaluation.answers import generate_answers
from rightrank.evaluation.tokens import Chat
from rightrank.schema.trials import Arm
from rightrank.training.multi_lora import MultiLora, Routing
from rightrank.training.runtime import Runtime
from tests.evaluation.chat_templates import PLAIN, REWRITING
from tests.helpers import make_runtime
from tests.tiny import build_small_settings, make_tokenizer

NEW = 12


@pytest.fixture(scope="module")
def runtime(model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    settings = build_small_settings(metric="f1", max_new_tokens=NEW, batch_size=3, max_eval_examples=16)
    return make_runtime(model_folder, completion_file, settings, tmp_path_factory.mktemp("answers"))


def generate_greedily(runtime: Runtime, prompt: str) -> str:
    """Generate token by token over the complete text: no batch, no padding, no cache."""
    tokenizer: Any = runtime.loaded.tokenizer
    ids: list[int] = tokenizer(prompt)["input_ids"]
    begin = len(ids)
    with torch.no_grad(), runtime.evaluator.disable_dropout():
        for _ in range(NEW):
            token = int(runtime.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            ids.append(token)
            if token == tokenizer.eos_token_id:
                break
    text: str = tokenizer.decode(ids[begin:], skip_special_tokens=True)
    return text


def perturb(parameters: dict[str, torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def test_a_batch_generates_what_each_prompt_alone_does(runtime: Runtime) -> None:
    answers = generate_answers(runtime.evaluator, "validation")
    assert len(answers) == len(runtime.data.splits["validation"])
    assert len({len(answer.prompt) for answer in answers}) > 3
    assert len({answer.completion for answer in answers}) > 1
    for answer in answers:
        assert answer.completion == generate_greedily(runtime, answer.prompt)


def test_each_adapter_of_several_generates_its_own_answers(runtime: Runtime) -> None:
    arms = [Arm(rank=r, learning_rate=1e-3, lora_alpha=32, seed=0, steps=1) for r in (2, 4)]
    plain = [answer.completion for answer in generate_answers(runtime.evaluator, "validation")]
    with MultiLora(runtime.model, runtime.settings) as multi_lora:
        for number, arm in enumerate(arms):
            perturb(multi_lora.add(f"arm{number}", arm, runtime.make_config(arm)), number)
        batched = []
        for number in range(2):
            with multi_lora.use_routing(Routing((f"arm{number}",), (None,))):
                batched.append([answer.completion for answer in generate_answers(runtime.evaluator, "validation")])
    assert batched[0] != batched[1]
    assert plain not in batched
    for number, arm in enumerate(arms):
        with MultiLora(runtime.model, runtime.settings) as multi_lora:
            perturb(multi_lora.add("only", arm, runtime.make_config(arm)), number)
            with multi_lora.use_routing(Routing(("only",), (None,))):
                assert [answer.completion for answer in generate_answers(runtime.evaluator, "validation")] == batched[
                    number
                ]
    assert [answer.completion for answer in generate_answers(runtime.evaluator, "validation")] == plain


@pytest.mark.parametrize(
    ("name", "header", "end"),
    [
        ("qwen 3", "say 2<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_end|>\n"),
        ("nemotron 3", "say 2<|im_end|>\n<|im_start|>assistant\n<think></think>", "<|im_end|>\n"),
        ("deepseek r1", "say 2<|Assistant|>", "<|end of sentence|>"),
        ("gpt-oss", "say 2<|end|><|start|>assistant<|channel|>final<|message|>", "<|return|>"),
    ],
)
@pytest.mark.parametrize("answer", ["two", "e"])
def test_a_prompt_is_what_precedes_the_answer_in_training(name: str, header: str, end: str, answer: str) -> None:
    """Check that the prompt includes the text that the template writes before every answer, so that the model writes the answer alone."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = REWRITING[name][0]
    prompt, suffix = Chat(tokenizer).split_around_answer([*PLAIN[:3], {"role": "assistant", "content": answer}])
    assert prompt.endswith(header)
    assert suffix == end
