"""From examples to token ids and labels. A label is -100 wherever no loss is taken.

Prompt and completion are tokenised together, and the prompt is masked by character offsets: a token across the border
counts as completion, and the ids are those that the model sees at inference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rightrank.engine.token_store import EncodedExample, TokenStore, lengths_of
from rightrank.errors import DataError
from rightrank.io.data import SPLITS, DataForm, DataSplits
from rightrank.io.example_store import Example
from rightrank.io.models import LoadedModel
from rightrank.records import DataSummary, SplitName, SplitSummary
from rightrank.settings import SelectSettings

IGNORED = -100  # the label without loss in torch and transformers


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
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(int(lengths_of(examples).max(initial=0)) for examples in self.splits.values())


def encode(data: DataSplits, model: LoadedModel, settings: SelectSettings, folder: Path | None = None) -> EncodedData:
    """Tokenise every split, into temporary files in `folder`.

    Raises:
        DataError: the chat template is missing or rewrites earlier turns, or a split has no label within `seq_len`.
    """
    limit = settings.seq_len
    encoder = _Encoder(model.tokenizer, data.form, data.classes, model.model.get_input_embeddings().num_embeddings)
    splits: dict[SplitName, Sequence[EncodedExample]] = {}
    summaries: dict[str, SplitSummary] = {}
    for split in SPLITS:
        count = _Count()
        pieces = _encode_split(encoder, data.examples[split], limit, settings.long_items, count)
        encoded = TokenStore(pieces, folder)
        if not encoded and data.examples[split]:
            shown = "validation" if split == "selection" else split
            raise DataError(
                f"the {shown} split has no label token left after tokenising ({len(data.examples[split])} examples, "
                f"{count.dropped} without a label within {limit} tokens); give examples with text to learn, or a larger seq_len"
            )
        splits[split] = encoded
        summaries[split] = SplitSummary(
            items=len(encoded),
            tokens=int(encoded.lengths.sum()),
            label_tokens=count.label_tokens,
            truncated=count.truncated,
            dropped=count.dropped,
        )
    summary = DataSummary(
        form=data.form,
        splits=summaries,
        splits_given=data.splits_given,
        duplicates_across_splits=data.duplicates_across_splits,
        classes=data.classes,
        unreadable=data.unreadable,
        control_characters=data.control_characters,
        rows=data.rows,
        repeated=data.repeated,
        not_evaluated=data.not_evaluated,
        shape=data.shape,
    )
    return EncodedData(splits, {"selection": data.examples["selection"], "test": data.examples["test"]}, summary)


def label_count(example: EncodedExample, classification: bool) -> int:
    """The number of labels with a loss. A language model takes none at the first position, which nothing precedes."""
    if classification:
        return 1
    return sum(label != IGNORED for label in example.labels[1:])


@dataclass(slots=True)
class _Count:
    """Counts over a split's examples, updated while they are encoded."""

    label_tokens: int = 0
    truncated: int = 0
    dropped: int = 0


def _encode_split(
    encoder: _Encoder, examples: Iterable[Example], limit: int, long_items: str, count: _Count
) -> Iterator[EncodedExample]:
    for example in examples:
        ids, labels = encoder(example)
        count.truncated += len(ids) > limit
        pieces = 0
        for start in (
            range(0, max(len(ids), 1), limit) if long_items == "split" and not encoder.is_classification else (0,)
        ):
            piece_ids = ids[start : start + limit]
            piece_labels = labels if encoder.is_classification else labels[start : start + limit]
            suffix = f"#{start}" if start else ""
            piece = EncodedExample(example.item_id + suffix, piece_ids, piece_labels)
            found = label_count(piece, encoder.is_classification)
            if piece_ids and found:
                yield piece
                count.label_tokens += found
                pieces += 1
        count.dropped += pieces == 0


class _Encoder:
    """example → (input_ids, labels), for one tokenizer and one form of data."""

    def __init__(self, tokenizer: Any, form: DataForm, classes: list[str] | None, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._form = form
        self._class_index = {name: index for index, name in enumerate(classes or [])}
        self.is_classification = form == "classification"
        if form == "messages" and not tokenizer.chat_template:
            raise DataError(
                "the data has `messages` but the tokenizer has no chat template; give `prompt` and `completion`"
            )

    def __call__(self, example: Example) -> tuple[list[int], list[int]]:
        content = example.content
        if self._form == "classification":
            return self._ids(content["text"]), [self._class_index[str(content["label"])]]
        if self._form == "text":
            ids = self._ids(content["text"]) if content["text"] else []
            ids = self._end(ids)
            return ids, list(ids)
        if self._form == "tokens":
            return self._known(content["input_ids"], example.where), self._known(content["labels"], example.where)
        if self._form == "messages":
            return self._conversation(content["messages"], 0, example.where)
        return self._prompt_completion(content["prompt"], content["completion"], example.where)

    def _known(self, ids: list[int], where: str) -> list[int]:
        """Token ids or labels of the data.

        Raises:
            DataError: one that the model does not have.
        """
        wrong = next((token for token in ids if token != IGNORED and not 0 <= token < self._vocabulary), None)
        if wrong is not None:
            raise DataError(
                f"{where}: token {wrong}, and the model has 0 to {self._vocabulary - 1}; tokenise with this model's tokenizer"
            )
        return ids

    def _prompt_completion(self, prompt: Any, completion: Any, where: str) -> tuple[list[int], list[int]]:
        if isinstance(prompt, list) or isinstance(completion, list):
            if not (isinstance(prompt, list) and isinstance(completion, list)):
                raise DataError(
                    f"{where}: `prompt` and `completion` have different types; give two strings or two lists of messages"
                )
            return self._conversation([*prompt, *completion], len(prompt), where)
        if not completion:
            return [], []
        ids, labels = self._masked(prompt + completion, [(len(prompt), len(prompt + completion))], special=True)
        ended = self._end(ids)
        return ended, labels + ended[len(ids) :]

    def _conversation(
        self, messages: Sequence[Mapping[str, str]], first: int, where: str
    ) -> tuple[list[int], list[int]]:
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

    def _masked(self, text: str, spans: Sequence[tuple[int, int]], special: bool) -> tuple[list[int], list[int]]:
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
