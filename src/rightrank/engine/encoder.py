"""One example as token ids and labels, for one tokenizer and one form of data.

Prompt and completion are tokenised together, and the prompt is masked by character offsets: a token across the border
counts as completion, and the ids are those that the model sees at inference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from rightrank.engine.token_store import EncodedExample
from rightrank.errors import DataError
from rightrank.io.example_store import Example
from rightrank.io.examples import DataForm

IGNORED = -100  # the label without loss in torch and transformers
EncodedSequence: TypeAlias = tuple[list[int], list[int]]  # token ids, and the label of each


def label_count(example: EncodedExample) -> int:
    """The number of label tokens with a loss; a sequence has none at its first position, which nothing precedes."""
    return sum(label != IGNORED for _, labels in example.sequences() for label in labels[1:])


def _first_label(labels: Sequence[int]) -> int:
    return next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))


class Encoder:
    """example → (input_ids, labels), for one tokenizer and one form of data."""

    def __init__(self, tokenizer: Any, form: DataForm, classes: list[str] | None, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
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
        if self.form == "tokens":
            return self._known(content["input_ids"], example.where), self._known(content["labels"], example.where)
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
        begins = [_first_label(labels) for labels in (of_chosen, of_rejected)]
        first = slice(min(begins), max(begins))
        of_chosen[first], of_rejected[first] = chosen[first], rejected[first]
        return (chosen, of_chosen), (rejected, of_rejected)

    def _answer(self, example: Example, column: str) -> EncodedSequence:
        prompt, answer = example.content["prompt"], example.content[column]
        if isinstance(prompt, list):
            return self._conversation([*prompt, *answer], len(prompt), example.where)
        return self._completed(prompt, answer)

    def _known(self, ids: list[int], where: str) -> list[int]:
        """Token ids or labels of the data."""
        wrong = next((token for token in ids if token != IGNORED and not 0 <= token < self._vocabulary), None)
        if wrong is not None:
            raise DataError(
                f"{where}: token {wrong}, and the model has 0 to {self._vocabulary - 1}; tokenise with this model's tokenizer"
            )
        return ids

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
