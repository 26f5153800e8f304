"""The model's answers to held-out examples, and the metrics that score them when a training ends.

An answer is greedy text, generated in batches with a key-value cache, or the predicted class. Built-in metrics compare it with the
expected answer, from 0 (worst) to 1 (best). Macro F1 is defined over classes. User functions are imported and called in this process.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from runpy import run_path
from typing import Any

import torch
from transformers import GenerationConfig

from rightrank.data.files import replace_file
from rightrank.data.forms import Example, select_template_inputs
from rightrank.evaluation.device import enable_kv_cache
from rightrank.evaluation.evaluator import Evaluator
from rightrank.evaluation.scores import MetricResults
from rightrank.evaluation.tokens import Chat
from rightrank.schema.errors import DataError, MetricError, SettingsError, is_out_of_memory, log_traceback, quote_value
from rightrank.schema.metrics import MetricSpec
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import SplitName


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """The model's answer to one held-out example; for classification, the predicted class."""

    example_id: str
    prompt: str
    completion: str
    expected: str


@dataclass(frozen=True, slots=True)
class _Prompt:
    example_id: str
    text: str
    expected: str
    add_special_tokens: bool  # False for a chat template, which writes them itself
    end: str = ""  # the text that the chat template writes after an answer


def generate_answers(evaluator: Evaluator, split: SplitName) -> list[ModelAnswer]:
    """Generate the answer to every example of a split that has a label within `seq_len`, with the current adapter, without its dropout.

    Raises:
        DataError: the data is plain text, which has no prompts.
    """
    if evaluator.data.is_classification:
        return _predict_classes(evaluator, split)
    if evaluator.data.summary.form == "text":
        raise DataError("the data has no prompts: metrics of generated answers need `prompt` and `completion`")
    encoded_ids = {example.example_id for example in evaluator.data.splits[split]}
    prompts = [_build_prompt(evaluator, row) for row in evaluator.data.texts[split] if row.example_id in encoded_ids]
    texts = zip(prompts, _generate(evaluator, prompts), strict=True)
    return [ModelAnswer(prompt.example_id, prompt.text, text, prompt.expected) for prompt, text in texts]


def _build_prompt(evaluator: Evaluator, example: Example) -> _Prompt:
    prompt = example.content.get("prompt")
    completion = example.content.get("completion", example.content.get("chosen"))  # pairs have a chosen answer
    if isinstance(prompt, str):
        return _Prompt(example.example_id, prompt, str(completion), add_special_tokens=True)
    messages = [*example.content["messages"]] if prompt is None else [*prompt, *(completion or [])]
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    chat = Chat(evaluator.loaded.tokenizer, select_template_inputs(example.content))
    text, end = chat.split_around_answer(messages[: last + 1])
    return _Prompt(example.example_id, text, messages[last]["content"], add_special_tokens=False, end=end)


@torch.no_grad()
def _generate(evaluator: Evaluator, prompts: Sequence[_Prompt]) -> list[str]:
    """Generate greedy text for each prompt, without adapter dropout.

    Prompts of similar length are batched. If memory runs out, the batch size is halved.
    """
    encoded = [_encode_prompt(evaluator, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    config = _make_generation_config(evaluator, prompts)
    texts = [""] * len(prompts)
    batch_size, begin = evaluator.settings.eval_batch_size, 0
    while begin < len(order):
        batch_indices = order[begin : begin + batch_size]
        try:
            with evaluator.disable_dropout(), enable_kv_cache(evaluator.model):
                generated = _generate_batch(evaluator, [encoded[index] for index in batch_indices], config)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or batch_size == 1:
                raise
            batch_size //= 2
            continue
        for index, text in zip(batch_indices, generated, strict=True):
            texts[index] = text
        begin += len(batch_indices)
    return texts


def _encode_prompt(evaluator: Evaluator, prompt: _Prompt) -> list[int]:
    """Return the token ids of a prompt. A prompt that is too long loses its beginning; an empty one becomes the beginning-of-text token."""
    tokenizer: Any = evaluator.loaded.tokenizer
    ids: list[int] = tokenizer(prompt.text, add_special_tokens=prompt.add_special_tokens, verbose=False)["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id and prompt.add_special_tokens:
        ids = ids[:-1]  # some tokenizers add an end token to every text
    positions = getattr(evaluator.model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int):
        ids = ids[-max(1, positions - evaluator.settings.max_new_tokens) :]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return ids or [start if start is not None else 0]


def _generate_batch(evaluator: Evaluator, token_ids: Sequence[list[int]], config: Any) -> list[str]:
    """Generate text for one batch. Prompts are padded on the left, so that every answer begins where its prompt ends."""
    tokenizer: Any = evaluator.loaded.tokenizer
    longest, pad = max(map(len, token_ids)), tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in token_ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in token_ids])
    device = evaluator.loaded.device
    output = evaluator.model.generate(
        input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
    )
    texts: list[str] = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return texts


def _make_generation_config(evaluator: Evaluator, prompts: Sequence[_Prompt]) -> Any:
    """Configure greedy decoding, which ends at any end token of the model, the tokenizer or the chat template.

    The model's own generation settings are ignored, except for its end tokens.
    """
    tokenizer: Any = evaluator.loaded.tokenizer
    model_end_ids = getattr(evaluator.model.generation_config, "eos_token_id", None)
    end_ids = {tokenizer.eos_token_id, *(model_end_ids if isinstance(model_end_ids, list) else [model_end_ids])}
    for end in {prompt.end for prompt in prompts if prompt.end}:
        first_id = tokenizer(end.lstrip(), add_special_tokens=False)["input_ids"][:1]
        end_ids |= set(first_id) & set(tokenizer.all_special_ids) | set(first_id) & set(tokenizer.added_tokens_decoder)
    config: Any = GenerationConfig  # untyped in transformers
    return config(
        max_new_tokens=evaluator.settings.max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(end for end in end_ids if end is not None) or None,
    )


@torch.no_grad()
def _predict_classes(evaluator: Evaluator, split: SplitName) -> list[ModelAnswer]:
    names, examples = evaluator.data.summary.classes or [], evaluator.data.splits[split]
    texts = {example.example_id: str(example.content["text"]) for example in evaluator.data.texts[split]}
    answers: list[ModelAnswer] = []
    size = evaluator.settings.eval_batch_size
    with evaluator.disable_dropout():
        for begin in range(0, len(examples), size):
            rows = list(range(begin, min(begin + size, len(examples))))
            batch = evaluator.make_batch(split, rows)
            logits = evaluator.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            for row, predicted in zip(rows, logits.argmax(-1).tolist(), strict=True):
                example = examples[row]
                expected = names[example.labels[0]]
                answers.append(ModelAnswer(example.example_id, texts[example.example_id], names[predicted], expected))
    return answers


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _normalise(text: str) -> str:
    """Return the text in lower case without punctuation, English articles and extra spaces, as in SQuAD's evaluation script."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def score_exact_match(expected: str, completion: str) -> float:
    """Return 1 if both texts are equal after normalisation, and 0 otherwise."""
    return float(_normalise(expected) == _normalise(completion))


def score_token_f1(expected: str, completion: str) -> float:
    """Return the harmonic mean of precision and recall over normalised words, each counted as often as it occurs."""
    completion_words, expected_words = _normalise(completion).split(), _normalise(expected).split()
    if not completion_words or not expected_words:
        return float(completion_words == expected_words)
    return _compute_f1(
        sum((Counter(completion_words) & Counter(expected_words)).values()), len(completion_words), len(expected_words)
    )


def score_rouge_l(expected: str, completion: str) -> float:
    """Return the F1 of ROUGE-L (Lin 2004): the longest common subsequence of words of lower-case letters and digits, without stemming."""
    completion_words, expected_words = _split_words(completion), _split_words(expected)
    if not completion_words or not expected_words:
        return 0.0
    return _compute_f1(
        _compute_common_length(completion_words, expected_words), len(completion_words), len(expected_words)
    )


def score_macro_f1(expected: Sequence[str], predicted: Sequence[str]) -> tuple[float, list[float]]:
    """Return the mean F1 over all expected and predicted classes, as `average="macro"` in scikit-learn, and a score per example.

    Macro F1 is not a mean over examples. The example scores are jackknife pseudo-values (Tukey 1958) around the metric, so that the
    metric is their mean. A test compares the standard error of their paired differences with that of a paired bootstrap of the
    examples, so the metric gets bounds like any other. Examples in the same cell of the confusion matrix have the same score, so
    that only a few matrices have to be scored.
    """
    pairs = Counter(zip(expected, predicted, strict=True))
    value, count = _compute_macro_f1(pairs), pairs.total()
    if count < 2:
        return value, [value]
    by_pair = {pair: _compute_macro_f1(pairs - Counter([pair])) for pair in pairs}
    leave_one_out = [by_pair[pair] for pair in zip(expected, predicted, strict=True)]
    mean = sum(leave_one_out) / count
    return value, [value + (count - 1) * (mean - score) for score in leave_one_out]


def _compute_macro_f1(pairs: Counter[tuple[str, str]]) -> float:
    expected_counts: Counter[str] = Counter()
    predicted_counts: Counter[str] = Counter()
    for (expected, predicted), count in pairs.items():
        expected_counts[expected] += count
        predicted_counts[predicted] += count
    classes = sorted({*expected_counts, *predicted_counts})
    return sum(_compute_f1(pairs[name, name], predicted_counts[name], expected_counts[name]) for name in classes) / len(
        classes
    )


def _split_words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _compute_f1(num_common: int, num_predicted: int, num_expected: int) -> float:
    return 2 * num_common / (num_predicted + num_expected)


def _compute_common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, by dynamic programming one row at a time."""
    row = [0] * (len(second) + 1)
    for word in first:
        previous_row = row
        row = [0]
        for column, second_word in enumerate(second, start=1):
            row.append(previous_row[column - 1] + 1 if word == second_word else max(previous_row[column], row[-1]))
    return row[-1]


TEXT_SCORES: dict[str, Callable[[str, str], float]] = {  # functions of the expected and the generated text
    "exact_match": score_exact_match,
    "f1": score_token_f1,
    "rougeL": score_rouge_l,
}


def measure_metrics(evaluator: Evaluator, split: SplitName, answers_file: Path | None = None) -> MetricResults:
    """Measure every metric that is due at the end of a training, on a split, with the current adapter.

    Args:
        split: the examples to answer.
        answers_file: a file for the answers, one JSON object per line: example_id, prompt, completion, expected.
    """
    specs = [spec for spec in evaluator.settings.metric_specs if not spec.is_eval_metric]
    results = MetricResults()
    if not specs:
        return results
    answers = generate_answers(evaluator, split)
    if answers_file is not None and answers:
        with replace_file(answers_file) as temporary:
            lines = (json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
            temporary.write_text("".join(lines), encoding="utf-8")
    for spec in specs:
        try:
            value, example_scores = score_answers(spec, answers)
        except MetricError as error:
            results.failures[spec.name] = str(error)
            continue
        results.values[spec.name] = value
        if example_scores is not None:
            results.example_scores[spec.name] = example_scores
    return results


def score_answers(spec: MetricSpec, answers: Sequence[ModelAnswer]) -> tuple[float, list[float] | None]:
    """Score the answers with a built-in metric or a user function.

    Returns:
        The metric's value, and the example scores of which it is the mean (for macro F1, pseudo-values); None if there are none.

    Raises:
        MetricError: the function failed, or returned something other than scores.
    """
    if spec.name in TEXT_SCORES:
        text_score = TEXT_SCORES[spec.name]
        values = [text_score(answer.expected, answer.completion) for answer in answers]
        return sum(values) / len(values), values
    if spec.name == "macro_f1":
        return score_macro_f1([answer.expected for answer in answers], [answer.completion for answer in answers])
    returned = _call_function(spec, answers)
    is_single_value = not isinstance(returned, list | tuple)
    scores = [returned] if is_single_value else list(returned)
    are_finite = all(isinstance(score, int | float) and math.isfinite(score) for score in scores)
    if not are_finite or len(scores) != (1 if is_single_value else len(answers)):
        raise MetricError(
            f"metric {spec.name!r}: the function returned {quote_value(returned)} for {len(answers)} examples; return a finite number, or one "
            "for each example"
        )
    values = [float(score) for score in scores]
    return sum(values) / len(values), None if is_single_value else values


def require_metric_functions(settings: SelectSettings) -> None:
    """Raise if the function of a metric does not exist. It is called before any model is loaded.

    Raises:
        SettingsError: a function does not exist.
    """
    for spec in settings.metric_specs:
        if spec.kind == "function":
            _load_function(spec)


def _call_function(spec: MetricSpec, answers: Sequence[ModelAnswer]) -> Any:
    """Call the user function and return its result, with numbers of numpy or torch converted to Python numbers."""
    function = _load_function(spec)
    arguments = {
        "prompts": [answer.prompt for answer in answers],
        "completions": [answer.completion for answer in answers],
        "expected": [answer.expected for answer in answers],
    }
    parameters = inspect.signature(function).parameters.values()
    accepts_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}
    try:
        with redirect_stdout(sys.stderr):
            returned = function(**{name: value for name, value in arguments.items() if accepts_any or name in names})
    except Exception as error:
        log_traceback(error)
        raise MetricError(f"metric {spec.name!r}: {spec.target} raised {type(error).__name__}: {error}") from error
    return returned.tolist() if hasattr(returned, "tolist") else returned


def _load_function(spec: MetricSpec) -> Callable[..., Any]:
    """Load the function `module:name` or `file.py:name`. Modules are also searched in the current folder.

    Raises:
        SettingsError: the module, the file or the function does not exist.
    """
    location, _, name = spec.target.rpartition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        names = run_path(location) if location.endswith(".py") else vars(importlib.import_module(location))
    except Exception as error:  # user code may raise anything on import
        log_traceback(error)
        raise SettingsError(
            f"metric {spec.name!r}: can't import {location!r} ({type(error).__name__}: {error})"
        ) from error
    function = names.get(name)
    if not callable(function):
        function_names = [key for key, value in names.items() if inspect.isfunction(value) and key[0] != "_"]
        raise SettingsError(
            f"metric {spec.name!r}: {location!r} has no function {name!r}; its functions are: {', '.join(function_names) or 'none'}"
        )
    typed: Callable[..., Any] = function
    return typed
