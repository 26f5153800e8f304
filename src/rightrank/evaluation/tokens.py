"""Convert examples to token ids and labels. A label is -100 where no loss is computed.

Prompt and completion are tokenised together, and the prompt is masked by character offsets. A token that crosses the border
counts as completion. The token ids are those that the model sees at inference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, groupby, islice, repeat
from os.path import commonprefix
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import TemplateError

from rightrank.bases.base_models import LoadedModel
from rightrank.data.forms import DataForm, Example, select_template_inputs
from rightrank.data.splits import HELD_OUT, SPLITS, DataSplits, number_groups
from rightrank.data.token_store import IGNORED, EncodedExample, TokenStore
from rightrank.schema.errors import DataError
from rightrank.schema.events import DataSummary
from rightrank.schema.results import SplitSummary
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import SplitName

EncodedSequence: TypeAlias = tuple[list[int], list[int]]  # token ids, and the label of each
EXAMPLES_PER_CALL = 32  # few enough that the garbage collector rarely visits the offsets of their tokens


def _count_example_labels(example: EncodedExample) -> int:
    """Return the number of labels with a loss. A sequence has none at its first position, which no token precedes."""
    return sum(_count_labels(labels) for _, labels in example.sequences())


def _count_labels(labels: Sequence[int]) -> int:
    return len(labels[1:]) - labels[1:].count(IGNORED)


@dataclass(frozen=True, slots=True)
class _Text:
    """A text to tokenise, with labels on the tokens that end within one of `spans`."""

    text: str
    spans: Sequence[tuple[int, int]] | None = None  # character ranges; None: every token is a label
    adds_special_tokens: bool = True  # adds the tokenizer's special tokens
    adds_eos: bool = False  # adds the end-of-sequence token, which is also a label

    def labels(self, ids: list[int], offsets: Sequence[tuple[int, int]]) -> list[int]:
        if self.spans is None:
            return list(ids)
        labels = [IGNORED] * len(ids)
        for first, last in self.spans:
            labels = [
                token if first < end <= last else label
                for token, label, (_, end) in zip(ids, labels, offsets, strict=True)
            ]
        return labels


PLACEHOLDER = "~rightrank~"  # replaces a message's content to find its position


class _UnlocatedAnswerError(DataError):
    """The chat template renders a conversation in a way that makes it impossible to locate an answer."""


REWRITES_TURNS = "rewrites earlier turns, so the assistant's tokens can't be located"


class Chat:
    """Conversations in the chat template of a tokenizer, with its other inputs, such as tools."""

    def __init__(self, tokenizer: Any, inputs: Mapping[str, Any] | None = None) -> None:
        self._tokenizer, self._inputs = tokenizer, dict(inputs or {})

    def render(self, messages: Sequence[Mapping[str, str]], prompt: bool = False, **mode: Any) -> str:
        """Render a conversation as text, followed by the template's prompt for an answer if `prompt` is set."""
        text: str = self._tokenizer.apply_chat_template(
            [*messages], tokenize=False, add_generation_prompt=prompt, **self._inputs, **mode
        )
        return text

    def find_unused_inputs(self, messages: Sequence[Mapping[str, str]]) -> list[str]:
        """Return the names of the inputs whose entries do not change the text that the template renders."""
        text = self.render(messages)
        emptied = {name: Chat(self._tokenizer, {**self._inputs, name: []}) for name in self._inputs}
        return [name for name, chat in emptied.items() if chat.render(messages) == text]

    def find_span(self, messages: Sequence[Mapping[str, str]], text: str, index: int) -> tuple[int, int]:
        """Find the answer at `index` in the `text` of a conversation: without its header, and with the end of its turn."""
        header, turn = self.render_header(messages[:index]), self.render(messages[: index + 1])
        if not text.startswith(turn):  # Phi-3's template ends a conversation with the end-of-sequence token
            turn = turn.removesuffix(self._tokenizer.eos_token or "")
        if text.startswith(turn) and turn.startswith(header):
            return len(header), len(turn)
        return self._find_marked_span(messages, text, index)

    def split_around_answer(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, str]:
        """Return `(the prompt for the last message, the text after its content)`, as the model sees them in training.

        The prompt consists of the header and the text that the template writes before any answer, such as an empty reasoning block.
        """
        text, last = self.render(messages), len(messages) - 1
        header = text[: self.find_span(messages, text, last)[0]]
        try:
            prefix, suffix = self._split_around(messages, last)
        except _UnlocatedAnswerError:
            return header, ""
        is_complete = text == prefix + messages[last]["content"] + suffix and prefix[len(header) :].strip()
        return prefix if is_complete else header, suffix if text.endswith(suffix) else ""

    def render_header(self, earlier: Sequence[Mapping[str, str]]) -> str:
        """Render the text before an assistant's answer to the `earlier` turns: their text and the prompt for an answer.

        If the template has no such prompt, or there is no earlier turn, two different answers are rendered. Their common beginning is
        the header, including the template's own system prompt.
        """
        if earlier and self._answer_cue:
            return self.render(earlier, prompt=True)
        common_text = _find_common_start(
            *(self.render([*earlier, {"role": "assistant", "content": letter}]) for letter in "AB")
        )
        if self._answer_cue not in common_text:
            raise _UnlocatedAnswerError(REWRITES_TURNS)
        return (
            common_text[: common_text.rindex(self._answer_cue) + len(self._answer_cue)]
            if self._answer_cue
            else common_text.rstrip(" ")
        )

    def _find_marked_span(self, messages: Sequence[Mapping[str, str]], text: str, index: int) -> tuple[int, int]:
        """Find an answer when the template renders the turns up to it differently, for example because it drops earlier reasoning.

        A placeholder replaces the content, and the content of the message before, to show the text that the template writes around them.
        The header is the common text of the turn and the prompt for an answer in one of the template's modes: either the complete
        prompt, or everything before the content.
        """
        if not index or not self._answer_cue:
            raise _UnlocatedAnswerError(REWRITES_TURNS)
        (prefix, suffix), (_, turn) = (self._split_around(messages, position) for position in (index, index - 1))
        begin, num_shared = len(text) - len(turn), len(_find_common_start(text, prefix))
        if not (text.endswith(turn) and text.endswith(suffix) and begin <= num_shared):
            raise _UnlocatedAnswerError(REWRITES_TURNS)
        end = len(text) - len(suffix) + self._measure_turn_end(messages[: index + 1], suffix)
        for mode in ({}, {"enable_thinking": False}):
            _, prompt = self._split_around(messages[:index], index - 1, prompt=True, **mode)
            header = len(_find_common_start(prompt, text[begin:num_shared]))
            if header in (len(prompt), num_shared - begin):
                return begin + header, end
        raise _UnlocatedAnswerError(REWRITES_TURNS)

    def _split_around(self, messages: Sequence[Mapping[str, str]], index: int, **options: bool) -> tuple[str, str]:
        """Return the text that the template writes before and after the content of a message."""
        marked = [*messages]
        marked[index] = {**messages[index], "content": PLACEHOLDER}
        text_sections = self.render(marked, **options).split(PLACEHOLDER)
        if len(text_sections) != 2:
            raise _UnlocatedAnswerError(REWRITES_TURNS)
        return text_sections[0], text_sections[1]

    def _measure_turn_end(self, messages: Sequence[Mapping[str, str]], suffix: str) -> int:
        """Return the length of the text that ends the last message, at the start of `suffix`.

        It is the text that the template writes when no other message follows, or else a single added token.
        """
        _, end = self._split_around(messages, len(messages) - 1)
        tokens = sorted(self._tokenizer.get_added_vocab(), key=len, reverse=True)
        ends = [end, end.removesuffix(self._tokenizer.eos_token or ""), *(tokens if end else ())]
        turn_end = next((text for text in ends if suffix.startswith(text) and (text or not end)), None)
        if turn_end is None:
            raise _UnlocatedAnswerError(REWRITES_TURNS)
        return len(turn_end)

    @cached_property
    def _answer_cue(self) -> str:
        """Return the end of the prompt for an answer; empty for a template without one."""
        plain, prompted = (self.render([{"role": "user", "content": "A"}], prompt) for prompt in (False, True))
        return prompted[len(_find_common_start(plain, prompted)) :]


def _find_common_start(*texts: str) -> str:
    return commonprefix(texts)  # noqa: RUF071 - it compares characters, as intended here


class _Encoder:
    def __init__(self, tokenizer: Any, form: DataForm, classes: list[str] | None) -> None:
        self._tokenizer, self._chat = tokenizer, Chat(tokenizer)
        self.form = form
        self._class_index = {name: index for index, name in enumerate(classes or [])}
        self.is_classification = form == "classification"

    def __call__(self, examples: Iterable[Example]) -> Iterator[tuple[Example, list[EncodedSequence]]]:
        """Yield each example with its sequences: two for a preference pair, one otherwise."""
        remaining = iter(examples)
        while group := list(islice(remaining, EXAMPLES_PER_CALL)):
            texts = [self._make_texts(example) for example in group]
            tokenised = self._tokenise(chain.from_iterable(texts))
            for example, example_texts in zip(group, texts, strict=True):
                sequences = list(islice(tokenised, len(example_texts)))
                if self.is_classification:
                    sequences = [(ids, [self._class_index[str(example.content["label"])]]) for ids, _ in sequences]
                yield example, _align_label_starts(sequences) if self.form == "preference" else sequences

    def _make_texts(self, example: Example) -> list[_Text]:
        content = example.content
        if self.form == "messages":
            return [self._make_conversation_text(content["messages"], 0, example)]
        if self.form == "preference":
            return [self._make_answer_text(content[name], example) for name in ("chosen", "rejected")]
        if self.form == "prompt_completion" and (content["completion"] != "" or isinstance(content["prompt"], list)):
            return [self._make_answer_text(content["completion"], example)]
        return [_Text(content.get("text", ""), adds_eos=not self.is_classification)]

    def _make_answer_text(self, answer: Any, example: Example) -> _Text:
        """Join prompt and answer in one text, with labels on the answer and on the end-of-sequence token after it."""
        prompt = example.content["prompt"]
        if isinstance(prompt, list) and isinstance(answer, list):
            return self._make_conversation_text([*prompt, *answer], len(prompt), example)
        if isinstance(prompt, list) or isinstance(answer, list):
            raise DataError(
                f"{example.origin}: `prompt` and `completion` have different types; give two strings or two lists of messages"
            )
        return _Text(prompt + answer, [(len(prompt), len(prompt + answer))], adds_eos=True)

    def _make_conversation_text(self, messages: Sequence[Mapping[str, str]], first: int, example: Example) -> _Text:
        """Render a conversation with labels on every assistant turn from message `first` on, without headers and with the ends of turns."""
        location, inputs = example.origin, select_template_inputs(example.content)
        if not self._tokenizer.chat_template:
            raise DataError(
                f"{location}: the row has messages, but the tokenizer has no chat template; give `prompt` and `completion` as strings"
            )
        chat = Chat(self._tokenizer, inputs) if inputs else self._chat
        try:
            for name in chat.find_unused_inputs(messages) if inputs else ():
                raise DataError(
                    f"{location}: the chat template does not use the column `{name}`; leave it out, or ignore it: --set columns=ignore={name}"
                )
            return _label_conversation(chat, messages, first)
        except TemplateError as error:
            raise DataError(
                f"{location}: the chat template rejects the conversation ({error}); leave the row out, or give `prompt` and `completion`"
            ) from None
        except _UnlocatedAnswerError as error:
            raise DataError(
                f"{location}: the chat template {error}; give `prompt` and `completion`, with one row per turn"
            ) from None

    def _tokenise(self, texts: Iterable[_Text]) -> Iterator[EncodedSequence]:
        for (special, has_spans), group in groupby(
            texts, key=lambda text: (text.adds_special_tokens, text.spans is not None)
        ):
            similar_texts = list(group)
            if has_spans and not self._tokenizer.is_fast:
                raise DataError(
                    "completions are located by character offsets, which this slow tokenizer does not support; give `text`, or a fast tokenizer"
                )
            encoded = self._tokenizer(
                [text.text for text in similar_texts],
                add_special_tokens=special,
                return_offsets_mapping=has_spans,
                return_attention_mask=False,
                verbose=False,
            )
            offsets = encoded["offset_mapping"] if has_spans else repeat(())
            for text, ids, token_offsets in zip(similar_texts, encoded["input_ids"], offsets, strict=False):
                labels = text.labels(ids, token_offsets)
                if not text.adds_eos:
                    yield ids, labels
                elif text.text or has_spans:
                    ended_ids = self._append_eos(ids)
                    yield ended_ids, labels + ended_ids[len(ids) :]
                else:
                    yield [], []  # an empty text has no labels

    def _append_eos(self, ids: list[int]) -> list[int]:
        """Return `ids` with the end-of-sequence token, unless the tokenizer has none or has already added it."""
        end = self._tokenizer.eos_token_id
        if end is None or not ids or ids[-1] == end:
            return list(ids)
        return [*ids, end]


def _label_conversation(chat: Chat, messages: Sequence[Mapping[str, str]], first: int) -> _Text:
    text = chat.render(messages)
    spans: list[tuple[int, int]] = []
    answer = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < first:
            continue
        spans.append(chat.find_span(messages, text, index))
        answer = message["content"]
    turn = text[spans[-2][1] if spans[1:] else 0 : spans[-1][1]] if spans else ""
    if "".join(answer.split()) not in "".join(turn.split()):
        raise _UnlocatedAnswerError("omits some text of the last answer, such as its reasoning")
    return _Text(text, spans, adds_special_tokens=False)


def _align_label_starts(sequences: list[EncodedSequence]) -> list[EncodedSequence]:
    """Let the labels of the chosen and the rejected answer of a preference pair begin at the same position, as in TRL.

    If a token that crosses the border belongs to one answer only, the other answer takes the prompt's last token as a label.
    """
    begins = [
        next((position for position, label in enumerate(labels) if label != IGNORED), len(labels))
        for _, labels in sequences
    ]
    first = slice(min(begins), max(begins))
    for ids, labels in sequences:
        labels[first] = ids[first]
    return sequences


EXAMPLE_METRICS: dict[
    str, tuple[str, ...]
] = {  # metrics that every evaluation measures per example, in addition to the loss
    "classification": ("accuracy",),
    "preference": ("reward_accuracy", "reward_margin", "chosen_log_ratio"),
}


@dataclass(frozen=True, slots=True)
class EncodedData:
    splits: Mapping[SplitName, TokenStore]
    texts: Mapping[SplitName, Sequence[Example]]  # the held-out examples, for generation
    summary: DataSummary
    # The group of each held-out example; None: no groups.
    groups: Mapping[SplitName, list[int] | None] = field(default_factory=dict)

    @property
    def is_classification(self) -> bool:
        return self.summary.form == "classification"

    @property
    def max_sequence_length(self) -> int:
        return max(int(examples.longest_sequences.max(initial=0)) for examples in self.splits.values())

    def get_loss_weight(self, example: EncodedExample) -> int:
        """Return the weight of an example in a mean loss: its number of labels, or 1 if the loss is one of the complete example."""
        return _count_example_labels(example) if self.summary.loss_kind == "token_loss" else 1


def encode_splits(
    data: DataSplits, model: LoadedModel, settings: SelectSettings, folder: Path | None = None
) -> EncodedData:
    """Tokenise every split, into temporary files in `folder`.

    Raises:
        DataError: the chat template is missing or rewrites earlier turns, or a split has no label within `seq_len`.
    """
    encoder = _Encoder(model.tokenizer, data.form, data.summary.classes)
    splits: dict[SplitName, TokenStore] = {}
    summaries: dict[str, SplitSummary] = {}
    for split in SPLITS:
        counts = Counter(label_tokens=0, truncated=0, dropped=0, equal=0)
        encoded = TokenStore(_encode_split(encoder, data.examples[split], settings.seq_len, counts), folder)
        if not encoded and data.examples[split]:
            raise DataError(
                f"the {split} split has no labels left after tokenising: of its {len(data.examples[split])} examples, {counts['dropped']} have "
                f"no label within {settings.seq_len} tokens, and {counts['equal']} have two equal answers there; give examples with longer "
                "answers, or a larger seq_len"
            )
        splits[split] = encoded
        summaries[split] = SplitSummary(examples=len(encoded), tokens=int(encoded.lengths.sum()), **counts)
    texts = {split: data.examples[split] for split in HELD_OUT}
    groups: dict[SplitName, list[int] | None] = {}
    for split, examples in texts.items():
        by_id = {example.example_id: example for example in examples}
        groups[split] = number_groups(by_id[example.example_id] for example in splits[split])
    num_groups = len(set(groups["validation"] or ()))
    summary = data.summary.model_copy(update={"splits": summaries, "groups": num_groups})
    return EncodedData(splits, texts, summary, groups)


def _encode_split(
    encoder: _Encoder, examples: Iterable[Example], limit: int, counts: Counter[str]
) -> Iterator[EncodedExample]:
    """Yield the examples within the limit, except those without a label and pairs of equal answers there; count all of them."""
    for example, sequences in encoder(examples):
        counts["truncated"] += any(len(ids) > limit for ids, _ in sequences)
        cut = [(ids[:limit], labels[:limit]) for ids, labels in sequences]
        first_ids, *second_ids = [ids for ids, _ in cut]
        if not all(ids if encoder.is_classification else _count_labels(labels) for ids, labels in cut):
            counts["dropped"] += 1
        elif second_ids == [first_ids]:
            counts["equal"] += 1
        else:
            ids, labels = (list(chain.from_iterable(columns)) for columns in zip(*cut, strict=True))
            encoded = EncodedExample(example.example_id, ids, labels, len(first_ids) if second_ids else 0)
            counts["label_tokens"] += 1 if encoder.is_classification else _count_example_labels(encoded)
            yield encoded
