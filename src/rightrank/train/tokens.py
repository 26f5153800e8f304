"""From examples to token ids and labels. A label is -100 wherever no loss is taken.

Prompt and completion are tokenised together, and the prompt is masked by character offsets: a token across the border
counts as completion, and the ids are those that the model sees at inference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from rightrank.data.forms import DataForm, Example
from rightrank.data.splits import SPLITS, DataSplits
from rightrank.data.token_store import IGNORED, EncodedExample, TokenStore, longest_sequence
from rightrank.models.base_models import LoadedModel
from rightrank.schema.errors import DataError
from rightrank.schema.events import DataSummary, SplitSummary
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import SplitName

EncodedSequence: TypeAlias = tuple[list[int], list[int]]  # token ids, and the label of each


def label_count(example: EncodedExample) -> int:
    """The number of label tokens with a loss; a sequence has none at its first position, which nothing precedes."""
    return sum(label != IGNORED for _, labels in example.sequences() for label in labels[1:])


class _Encoder:
    """example → (input_ids, labels), for one tokenizer and one form of data."""

    def __init__(self, tokenizer: Any, form: DataForm, classes: list[str] | None) -> None:
        self._tokenizer = tokenizer
        self.form = form
        self._class_index = {name: index for index, name in enumerate(classes or [])}
        self.is_classification = form == "classification"
        if form == "messages" and not tokenizer.chat_template:  # pairs of messages: see `_render`
            raise DataError(
                "the data has `messages` but the tokenizer has no chat template; give `prompt` and `completion`"
            )

    def __call__(self, example: Example) -> EncodedSequence:
        content = example.content
        if self.form == "classification":
            return self._ids(content["text"]), [self._class_index[str(content["label"])]]
        if self.form == "text":
            ids = self._ids(content["text"]) if content["text"] else []
            ids = self._end(ids)
            return ids, list(ids)
        if self.form == "messages":
            return self._conversation(content["messages"], 0, example.where)
        return self._prompt_completion(content["prompt"], content["completion"], example.where)

    def labels_of(self, example: EncodedExample) -> int:
        return 1 if self.is_classification else label_count(example)

    def pair(self, example: Example) -> tuple[EncodedSequence, EncodedSequence]:
        """The chosen and the rejected answer of a preference pair, each after the prompt.

        Labels begin at the same position in both, as in TRL: where a token across the border belongs to one answer alone, the
        other takes the prompt's last token as a label.
        """
        (chosen, of_chosen), (rejected, of_rejected) = (self._answer(example, name) for name in ("chosen", "rejected"))
        begins = [
            next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))
            for labels in (of_chosen, of_rejected)
        ]
        first = slice(min(begins), max(begins))
        of_chosen[first], of_rejected[first] = chosen[first], rejected[first]
        return (chosen, of_chosen), (rejected, of_rejected)

    def _answer(self, example: Example, column: str) -> EncodedSequence:
        prompt, answer = example.content["prompt"], example.content[column]
        if isinstance(prompt, list):
            return self._conversation([*prompt, *answer], len(prompt), example.where)
        return self._completed(prompt, answer)

    def _prompt_completion(self, prompt: Any, completion: Any, where: str) -> EncodedSequence:
        if isinstance(prompt, list) or isinstance(completion, list):
            if not (isinstance(prompt, list) and isinstance(completion, list)):
                raise DataError(
                    f"{where}: `prompt` and `completion` have different types; give two strings or two lists of messages"
                )
            return self._conversation([*prompt, *completion], len(prompt), where)
        return self._completed(prompt, completion) if completion else ([], [])

    def _completed(self, prompt: str, completion: str) -> EncodedSequence:
        """The texts as one, with labels on the completion and on the end-of-sequence token after it."""
        ids, labels = self._masked(prompt + completion, [(len(prompt), len(prompt + completion))], special=True)
        ended = self._end(ids)
        return ended, labels + ended[len(ids) :]

    def _conversation(self, messages: Sequence[Mapping[str, str]], first: int, where: str) -> EncodedSequence:
        """Labels on every assistant turn from message `first` on, located by rendering each prefix of the conversation."""
        whole = self._render(messages, False)
        spans: list[tuple[int, int]] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index < first:
                continue
            before = self._render(messages[:index], True)
            after = self._render(messages[: index + 1], False)
            if not (whole.startswith(after) and after.startswith(before)):
                raise DataError(
                    f"{where}: the chat template rewrites earlier turns, so the assistant's tokens can't be located; "
                    "give `prompt` and `completion`, one row a turn"
                )
            spans.append((len(before), len(after)))
        return self._masked(whole, spans, special=False)

    def _render(self, messages: Sequence[Mapping[str, str]], generation_prompt: bool) -> str:
        if not messages:
            return ""
        text: str = self._tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation_prompt
        )
        return text

    def _masked(self, text: str, spans: Sequence[tuple[int, int]], special: bool) -> EncodedSequence:
        if not self._tokenizer.is_fast:
            raise DataError(
                "completions are located by character offsets, which this slow tokenizer lacks; give `text`, or a fast tokenizer"
            )
        encoded = self._tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        ids: list[int] = encoded["input_ids"]
        labels = [
            token if any(start < end_of_token <= end for start, end in spans) else IGNORED
            for token, (_, end_of_token) in zip(ids, encoded["offset_mapping"], strict=True)
        ]
        return ids, labels

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, verbose=False)["input_ids"]
        return ids

    def _end(self, ids: list[int]) -> list[int]:
        """`ids` with the end-of-sequence token, unless the tokenizer has none or has added it."""
        end = self._tokenizer.eos_token_id
        if end is None or not ids or ids[-1] == end:
            return list(ids)
        return [*ids, end]


EXAMPLE_METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy",),
    "preference": ("reward_accuracy", "reward_margin", "chosen_log_ratio"),
}


@dataclass(frozen=True, slots=True)
class EncodedData:
    """The encoded splits, and a summary of what was truncated and dropped."""

    splits: Mapping[SplitName, Sequence[EncodedExample]]
    texts: Mapping[SplitName, Sequence[Example]]  # the held-out examples, for generation
    summary: DataSummary

    @property
    def is_classification(self) -> bool:
        return self.summary.form == "classification"

    @property
    def is_preference(self) -> bool:
        return self.summary.form == "preference"

    @property
    def example_metrics(self) -> tuple[str, ...]:
        """The metrics that every evaluation gives for each example, beside the loss."""
        return EXAMPLE_METRICS.get(self.summary.form, ())

    @property
    def sequences_per_example(self) -> int:
        return 2 if self.is_preference else 1

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(longest_sequence(examples) for examples in self.splits.values())

    def loss_weight(self, example: EncodedExample) -> int:
        """What an example counts in a mean loss: its labels, or 1 where the loss is one of the whole example."""
        return label_count(example) if self.summary.is_token_loss else 1


def encode(data: DataSplits, model: LoadedModel, settings: SelectSettings, folder: Path | None = None) -> EncodedData:
    """Tokenise every split, into temporary files in `folder`.

    Raises:
        DataError: the chat template is missing or rewrites earlier turns, or a split has no label within `seq_len`.
    """
    limit = settings.seq_len
    encoder = _Encoder(model.tokenizer, data.form, data.classes)
    splits: dict[SplitName, Sequence[EncodedExample]] = {}
    summaries: dict[str, SplitSummary] = {}
    for split in SPLITS:
        count = _Count()
        pieces = _encode_split(encoder, data.examples[split], limit, count)
        encoded = TokenStore(pieces, folder)
        if not encoded and data.examples[split]:
            shown = "validation" if split == "selection" else split
            raise DataError(
                f"the {shown} split has no label token left after tokenising ({len(data.examples[split])} examples, "
                f"{count.left_out(limit)}); give examples with text to learn, or a larger seq_len"
            )
        splits[split] = encoded
        summaries[split] = SplitSummary(
            items=len(encoded),
            tokens=int(encoded.lengths.sum()),
            label_tokens=count.label_tokens,
            truncated=count.truncated,
            dropped=count.dropped,
            equal=count.equal,
        )
    of_data = {name: getattr(data, name) for name in DataSummary.model_fields if name != "splits"}
    summary = DataSummary(splits=summaries, **of_data)
    return EncodedData(splits, {"selection": data.examples["selection"], "test": data.examples["test"]}, summary)


@dataclass(slots=True)
class _Count:
    """Counts over a split's examples, updated while they are encoded."""

    label_tokens: int = 0
    truncated: int = 0
    dropped: int = 0  # examples without a label within the limit
    equal: int = 0  # pairs whose sequences are the same within the limit
    first_left_out: str = ""  # file and row

    def left_out(self, limit: int) -> str:
        equal = f", {self.equal} whose answers are the same there" if self.equal else ""
        first = f", the first at {self.first_left_out}" if self.first_left_out else ""
        return f"{self.dropped} without a label within {limit} tokens{equal}{first}"


def _encode_split(
    encoder: _Encoder, examples: Iterable[Example], limit: int, count: _Count
) -> Iterator[EncodedExample]:
    for example in examples:
        if encoder.form == "preference":
            encoded = _pair(encoder, example, limit, count)
        else:
            encoded = _one(encoder, example, limit, count)
        if not encoded:
            count.first_left_out = count.first_left_out or example.where
        count.label_tokens += sum(encoder.labels_of(one) for one in encoded)
        yield from encoded


def _one(encoder: _Encoder, example: Example, limit: int, count: _Count) -> list[EncodedExample]:
    """The example within the limit; empty if it has no label there."""
    ids, labels = encoder(example)
    count.truncated += len(ids) > limit
    encoded = EncodedExample(example.item_id, ids[:limit], labels if encoder.is_classification else labels[:limit])
    if encoded.input_ids and encoder.labels_of(encoded):
        return [encoded]
    count.dropped += 1
    return []


def _pair(encoder: _Encoder, example: Example, limit: int, count: _Count) -> list[EncodedExample]:
    """Both sequences of a preference pair within the limit; empty if one has no label there, or if they are the same."""
    sequences = encoder.pair(example)
    count.truncated += any(len(ids) > limit for ids, _ in sequences)
    (chosen, chosen_labels), (rejected, rejected_labels) = ((ids[:limit], of[:limit]) for ids, of in sequences)
    if not all(any(label != IGNORED for label in labels[1:]) for labels in (chosen_labels, rejected_labels)):
        count.dropped += 1
        return []
    if chosen == rejected:
        count.equal += 1
        return []
    return [EncodedExample(example.item_id, chosen + rejected, chosen_labels + rejected_labels, len(chosen))]
