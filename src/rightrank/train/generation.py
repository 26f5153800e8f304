"""What the model answers to held-out examples: greedy text, in batches with a key-value cache, or the predicted class."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from rightrank.data.forms import Example
from rightrank.schema.errors import DataError, MetricError, MissingExtraError, SettingsError, is_out_of_memory
from rightrank.schema.metrics import MetricSpec
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import SplitName
from rightrank.train.device import kv_cache
from rightrank.train.distributed import broadcast, process_index, world_size
from rightrank.train.runtime import Runtime
from rightrank.train.scorers import ModelAnswer, Scored, ScorerLimits, require_scorer, score, write_answers
from rightrank.train.scores import exact_match, macro_f1, rouge_l, rouge_n, token_f1

MAX_SAMPLE_PROMPT_TOKENS = 256  # longer prompts are not shown as samples


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the model sees it, with the answer in the data."""

    item_id: str
    text: str
    expected: str
    add_special_tokens: bool  # False for a chat template, which writes them itself
    end: str = ""  # what the chat template writes after an answer


def prompts(runtime: Runtime, split: SplitName) -> list[Prompt]:
    """The prompts of a split's examples that have a label within `seq_len`, in the split's order.

    Raises:
        DataError: the data is plain text, which has no prompt.
    """
    if runtime.data.summary.form in ("text", "tokens"):
        raise DataError("the data has no prompt: metrics of what the model writes need `prompt` and `completion`")
    kept = {example.item_id.split("#")[0] for example in runtime.examples(split)}
    return [_prompt(runtime, example) for example in runtime.data.texts[split] if example.item_id in kept]


def answers(runtime: Runtime, split: SplitName) -> list[ModelAnswer]:
    """The answer to every example of a split under the adapter that the base now carries, without adapter dropout."""
    if runtime.data.is_classification:
        return _predicted_classes(runtime, split)
    asked = prompts(runtime, split)
    with runtime.without_dropout(), kv_cache(runtime.model):
        texts = _generate_shared(runtime, asked)
    return [ModelAnswer(p.item_id, p.text, text, p.expected) for p, text in zip(asked, texts, strict=True)]


def promptable_examples(runtime: Runtime, count: int) -> list[Example]:
    """The first `count` test examples with a string prompt that is not too long to show."""
    if runtime.data.summary.form not in ("prompt_completion", "preference"):
        return []
    tokenizer = runtime.loaded.tokenizer
    found: list[Example] = []
    for example in runtime.data.texts["test"]:
        if len(found) == count:
            break
        prompt = example.content["prompt"]
        if isinstance(prompt, str) and 0 < len(tokenizer(prompt)["input_ids"]) <= MAX_SAMPLE_PROMPT_TOKENS:
            found.append(example)
    return found


def write_completion(runtime: Runtime, example: Example) -> str:
    """The answer to one example, generated in this process as `answers` generates it."""
    with runtime.without_dropout(), kv_cache(runtime.model):
        return _generate(runtime, [_prompt(runtime, example)])[0]


def expected_of(example: Example) -> Any:
    """The answer in the data: the completion, or the chosen one of a preference pair."""
    return example.content.get("completion", example.content.get("chosen"))


def _prompt(runtime: Runtime, example: Example) -> Prompt:
    prompt, completion = example.content.get("prompt"), expected_of(example)
    if isinstance(prompt, str):
        return Prompt(example.item_id, prompt, str(completion), add_special_tokens=True)
    messages = [*example.content["messages"]] if prompt is None else [*prompt, *(completion or [])]
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    tokenizer: Any = runtime.loaded.tokenizer
    before = tokenizer.apply_chat_template(messages[:last], tokenize=False, add_generation_prompt=True) if last else ""
    whole = tokenizer.apply_chat_template(messages[: last + 1], tokenize=False)
    expected = messages[last]["content"]
    _, found, end = whole[len(before) :].rpartition(expected)
    return Prompt(example.item_id, before, expected, add_special_tokens=False, end=end if found else "")


def _generate_shared(runtime: Runtime, asked: Sequence[Prompt]) -> list[str]:
    """Texts in the order of the prompts; with several processes, each generates its share."""
    texts: dict[int, str] = {}
    for process in range(world_size()):
        mine = list(range(len(asked)))[process :: world_size()]
        generated = _generate(runtime, [asked[index] for index in mine]) if process == process_index() else None
        texts |= dict(zip(mine, broadcast(process, generated), strict=True))
    return [texts[index] for index in range(len(asked))]


@torch.no_grad()
def _generate(runtime: Runtime, asked: Sequence[Prompt]) -> list[str]:
    """Greedy text for each prompt. Batches hold prompts of like length; running out of memory halves the batch size."""
    encoded = [_prompt_ids(runtime, prompt) for prompt in asked]
    order = sorted(range(len(asked)), key=lambda index: len(encoded[index]))
    config = _generation_config(runtime, asked)
    texts = [""] * len(asked)
    size, begin = runtime.settings.eval_batch_size, 0
    while begin < len(order):
        chosen = order[begin : begin + size]
        try:
            generated = _generate_batch(runtime, [encoded[index] for index in chosen], config)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or size == 1:
                raise
            size //= 2
            continue
        for index, text in zip(chosen, generated, strict=True):
            texts[index] = text
        begin += len(chosen)
    return texts


def _prompt_ids(runtime: Runtime, prompt: Prompt) -> list[int]:
    """Token ids. A prompt too long for the model keeps its end; an empty one becomes the beginning-of-text token."""
    tokenizer: Any = runtime.loaded.tokenizer
    ids: list[int] = tokenizer(prompt.text, add_special_tokens=prompt.add_special_tokens, verbose=False)["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id and prompt.add_special_tokens:
        ids = ids[:-1]  # added by a tokenizer that ends every text
    positions = getattr(runtime.model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int):
        ids = ids[-max(1, positions - runtime.settings.max_new_tokens) :]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return ids or [start if start is not None else 0]


def _generate_batch(runtime: Runtime, token_ids: Sequence[list[int]], config: Any) -> list[str]:
    """Pad on the left, so that every answer begins where its prompt ends."""
    tokenizer: Any = runtime.loaded.tokenizer
    longest, pad = max(map(len, token_ids)), tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in token_ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in token_ids])
    device = runtime.loaded.device
    output = runtime.model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config)
    texts: list[str] = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return texts


def _generation_config(runtime: Runtime, asked: Sequence[Prompt]) -> Any:
    """Greedy decoding, whatever the model's own configuration; it ends at any end token of model, tokenizer or template."""
    tokenizer: Any = runtime.loaded.tokenizer
    own = getattr(runtime.model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    for end in {prompt.end for prompt in asked if prompt.end}:
        first = tokenizer(end.lstrip(), add_special_tokens=False)["input_ids"][:1]
        ends |= set(first) & set(tokenizer.all_special_ids) | set(first) & set(tokenizer.added_tokens_decoder)
    config: Any = GenerationConfig  # untyped in transformers
    return config(
        max_new_tokens=runtime.settings.max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(end for end in ends if end is not None) or None,
    )


@torch.no_grad()
def _predicted_classes(runtime: Runtime, split: SplitName) -> list[ModelAnswer]:
    names, examples = runtime.data.summary.classes or [], runtime.examples(split)
    texts = {example.item_id: str(example.content["text"]) for example in runtime.data.texts[split]}
    found: list[ModelAnswer] = []
    size = runtime.settings.eval_batch_size
    with runtime.without_dropout():
        for begin in range(0, len(examples), size):
            rows = list(range(begin, min(begin + size, len(examples))))
            batch = runtime.batch(split, rows)
            logits = runtime.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            for row, predicted in zip(rows, logits.argmax(-1).tolist(), strict=True):
                example = examples[row]
                expected = names[example.labels[0]]
                found.append(ModelAnswer(example.item_id, texts[example.item_id], names[predicted], expected))
    return found


MEAN_TOLERANCE = 1e-9  # relative, between a metric and the mean of its examples' scores


def require_task(spec: MetricSpec) -> None:
    """Check that a task can be run.

    Raises:
        SettingsError: there is no such file, or no task in it.
        MissingExtraError: lm-eval is not installed.
    """
    path = Path(spec.target)
    if not path.is_file() or path.suffix not in (".yaml", ".yml"):
        raise SettingsError(f"metric {spec.name!r}: {spec.target!r} is no task file; give lm-eval:TASK.yaml[:METRIC]")
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise MissingExtraError(
            f"metric {spec.name!r}: tasks of lm-evaluation-harness need an extra: pip install 'rightrank[lm-eval]'"
        ) from None
    _task_name(spec)


def score_task(runtime: Runtime, spec: MetricSpec) -> Scored:
    """The task's metric under the adapter that the base now carries, with one score per example if it is their mean.

    Raises:
        MetricError: the task can't be run, or does not have the metric.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    name = _task_name(spec)
    with runtime.without_dropout(), kv_cache(runtime.model), redirect_stdout(sys.stderr):
        try:
            found = lm_eval.simple_evaluate(
                model=HFLM(
                    pretrained=runtime.model,
                    tokenizer=runtime.loaded.tokenizer,
                    batch_size=runtime.settings.eval_batch_size,
                ),
                tasks=[name],
                task_manager=TaskManager(include_path=str(Path(spec.target).parent), include_defaults=False),
                bootstrap_iters=0,
                verbosity="ERROR",
            )
        except Exception as error:  # a task file runs whatever it names
            reason = " ".join(str(error).split())[:300]
            raise MetricError(f"metric {spec.name!r}: task {name!r} raised {type(error).__name__}: {reason}") from error
    return _scored(spec, found["results"][name], found["samples"][name])


def _task_name(spec: MetricSpec) -> str:
    """The task's name in the file, read without running the functions that the file may name."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: None)
    try:
        content = yaml.load(Path(spec.target).read_text(encoding="utf-8"), Loader)  # a safe loader
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"metric {spec.name!r}: {spec.target}: {' '.join(str(error).split())}") from None
    name = content.get("task") if isinstance(content, Mapping) else None
    if not isinstance(name, str):
        raise SettingsError(f"metric {spec.name!r}: {spec.target} names no single task (`task: NAME`)")
    return name


def _scored(spec: MetricSpec, result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Scored:
    """The requested metric, or the task's first. Names match without the filter (`acc,none` is `acc`)."""
    numbers = {key: value for key, value in result.items() if "," in key and "_stderr" not in key}
    keys = [key for key in numbers if spec.key in (None, key, key.split(",")[0])]
    if not keys or not isinstance(numbers[keys[0]], int | float):
        there = ", ".join(dict.fromkeys(key.split(",")[0] for key in numbers)) or "none"
        raise MetricError(f"metric {spec.name!r}: the task has no number {spec.key!r}; it has: {there}")
    metric, _, chosen = keys[0].partition(",")
    value = float(numbers[keys[0]])
    mine = sorted((s for s in samples if s.get("filter", chosen) == chosen), key=lambda sample: sample["doc_id"])
    found = [sample.get(metric) for sample in mine]
    scores = [float(score) for score in found if isinstance(score, int | float)]
    if not scores or len(scores) < len(found):
        return Scored(value, None)
    is_mean = abs(sum(scores) / len(scores) - value) <= MEAN_TOLERANCE * max(1.0, abs(value))
    return Scored(value, scores if is_mean else None)


TEXT_SCORES: dict[str, Callable[[str, str], float]] = {  # of the expected and the generated text
    "exact_match": exact_match,
    "f1": token_f1,
    "rouge1": partial(rouge_n, n=1),
    "rouge2": partial(rouge_n, n=2),
    "rougeL": rouge_l,
}


@dataclass(frozen=True, slots=True)
class Measured:
    """Metrics by name, and the reasons why some failed."""

    scored: dict[str, Scored] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, float]:
        return {name: scored.value for name, scored in self.scored.items()}

    @property
    def items(self) -> dict[str, list[float]]:
        return {name: scored.examples for name, scored in self.scored.items() if scored.examples is not None}

    def require(self, names: Sequence[str]) -> None:
        """Check that these metrics have a value.

        Raises:
            MetricError: one of them failed.
        """
        reason = next((self.failed[name] for name in names if name in self.failed), None)
        if reason is not None:
            raise MetricError(f"{reason}; trained adapters are kept: fix the cause and run the same command again")


def end_metrics(settings: SelectSettings) -> list[MetricSpec]:
    """The metrics of the settings that are measured when a training ends."""
    return [spec for spec in settings.metric_specs if not spec.is_measured_along]


METRIC_TIMEOUT_SECONDS = 600.0  # of a function or program that computes a metric


def limits_of(settings: SelectSettings) -> ScorerLimits:
    return ScorerLimits(METRIC_TIMEOUT_SECONDS, settings.trust_remote_code)


def require_scorers(settings: SelectSettings) -> None:
    """Check before anything is loaded that every metric can be measured.

    Raises:
        SettingsError: a metric can't be measured.
        MissingExtraError: a metric needs an extra that is not installed.
    """
    for spec in settings.metric_specs:
        require_scorer(spec, limits_of(settings))
        if spec.kind == "lm-eval":
            require_task(spec)


def measure(runtime: Runtime, split: SplitName, keep: Path | None = None) -> Measured:
    """Every end metric on a split, under the adapter that the base now carries.

    Args:
        split: the examples to answer. Tasks bring their own examples, so they are measured for `selection` only.
        keep: a file for the answers.
    """
    specs = end_metrics(runtime.settings)
    measured = Measured()
    if not specs:
        return measured
    answered = answers(runtime, split) if any(spec.needs_answers for spec in specs) else []
    if keep is not None and answered and process_index() == 0:
        write_answers(answered, keep)
    for spec in specs:
        if spec.kind == "lm-eval" and split != "selection":
            continue
        try:
            measured.scored[spec.name] = _in_every_process(partial(_score, runtime, spec, answered))
        except MetricError as error:
            measured.failed[spec.name] = str(error)
    return measured


def _score(runtime: Runtime, spec: MetricSpec, answered: Sequence[ModelAnswer]) -> Scored:
    if spec.kind == "lm-eval":
        return score_task(runtime, spec)
    if spec.name in TEXT_SCORES:
        text_score = TEXT_SCORES[spec.name]
        return Scored.of_examples([text_score(answer.expected, answer.completion) for answer in answered])
    if spec.name == "macro_f1":
        return Scored(macro_f1([a.expected for a in answered], [a.completion for a in answered]), None)
    with tempfile.TemporaryDirectory(prefix="rightrank-") as folder:
        path = Path(folder) / "answers.jsonl"
        write_answers(answered, path)
        return score(spec, path, len(answered), limits_of(runtime.settings))


def _in_every_process(task: Callable[[], Scored]) -> Scored:
    """Run `task` in process 0 and return its result in every process."""
    result: dict[str, object] = {}
    if process_index() == 0:
        try:
            scored = task()
            result = {"value": scored.value, "items": scored.examples}
        except MetricError as error:
            result = {"error": str(error)}
    result = broadcast(0, result)
    if "error" in result:
        raise MetricError(str(result["error"]))
    return Scored(result["value"], result["items"])  # type: ignore[arg-type]
