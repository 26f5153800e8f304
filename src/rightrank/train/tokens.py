"""From examples to token ids and labels. A label is -100 wherever no loss is taken.

Prompt and completion are tokenised together, and the prompt is masked by character offsets: a token across the border
counts as completion, and the ids are those that the model sees at inference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, groupby, repeat
from os.path import commonprefix
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import TemplateError

from rightrank.data.forms import DataForm, Example
from rightrank.data.splits import HELD_OUT, SPLITS, DataSplits, group_numbers
from rightrank.data.token_store import IGNORED, EncodedExample, TokenStore
from rightrank.models.base_models import LoadedModel
from rightrank.schema.errors import DataError
from rightrank.schema.events import DataSummary, SplitSummary
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import SplitName, split_name

EncodedSequence: TypeAlias = tuple[list[int], list[int]]  # token ids, and the label of each
AT_ONCE = 2**13  # characters tokenised in one call: few enough that the collector of cycles seldom visits their offsets
COST_OF_TEXT = 64  # characters that a text counts for beside its own


def _label_count(example: EncodedExample) -> int:
    """The number of label tokens with a loss; a sequence has none at its first position, which nothing precedes."""
    return sum(_count_of(labels) for _, labels in example.sequences())


def _count_of(labels: Sequence[int]) -> int:
    return len(labels[1:]) - labels[1:].count(IGNORED)


@dataclass(frozen=True, slots=True)
class _Text:
    """A text to tokenise, with labels on the tokens that end in one of `spans`."""

    text: str
    spans: Sequence[tuple[int, int]] | None = None  # of characters; None: every token is a label
    special: bool = True  # with the tokenizer's special tokens
    ended: bool = False  # with the end-of-sequence token, which is a label too

    def labels(self, ids: list[int], offsets: Sequence[tuple[int, int]]) -> list[int]:
        """The label of each token, from its characters."""
        if self.spans is None:
            return list(ids)
        labels = [IGNORED] * len(ids)
        for first, last in self.spans:
            labels = [
                token if first < end <= last else label
                for token, label, (_, end) in zip(ids, labels, offsets, strict=True)
            ]
        return labels


MARK = "~rightrank~"  # in the place of a message's content, to see where that is


class _UnlocatedError(DataError):
    """What the chat template does by which an answer can't be trained on."""


REWRITES = "rewrites earlier turns, so the assistant's tokens can't be located"


class Chat:
    """Conversations in the chat template of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def render(self, messages: Sequence[Mapping[str, str]], prompt: bool = False, **mode: bool) -> str:
        """The text of a conversation, with the template's prompt for an answer at its end where `prompt` is set."""
        text: str = self._tokenizer.apply_chat_template(
            [*messages], tokenize=False, add_generation_prompt=prompt, **mode
        )
        return text

    def span(self, messages: Sequence[Mapping[str, str]], whole: str, index: int) -> tuple[int, int]:
        """Where the answer at `index` is in the `whole` text of a conversation, without its header and with what ends the turn."""
        header, turn = self.header(messages[:index]), self.render(messages[: index + 1])
        if not whole.startswith(turn):  # Phi-3's template ends a conversation with the end-of-sequence token
            turn = turn.removesuffix(self._tokenizer.eos_token or "")
        if whole.startswith(turn) and turn.startswith(header):
            return len(header), len(turn)
        return self._marked_span(messages, whole, index)

    def around_answer(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, str]:
        """`(the prompt for the last message, what follows its content)`, as the model sees them in training.

        The prompt is the header, with what the template writes before any answer, such as an empty reasoning.
        """
        whole, last = self.render(messages), len(messages) - 1
        header = whole[: self.span(messages, whole, last)[0]]
        try:
            before, after = self._around(messages, last)
        except _UnlocatedError:
            return header, ""
        is_whole = whole == before + messages[last]["content"] + after and before[len(header) :].strip()
        return before if is_whole else header, after if whole.endswith(after) else ""

    def header(self, earlier: Sequence[Mapping[str, str]]) -> str:
        """What precedes an assistant's answer to the `earlier` turns: their text and the prompt for an answer.

        A template without such a prompt, and one with no earlier turn, writes two answers that differ: what precedes both is the
        header, with the template's own system prompt.
        """
        if earlier and self._cue:
            return self.render(earlier, prompt=True)
        shared = _common_start(*(self.render([*earlier, {"role": "assistant", "content": letter}]) for letter in "AB"))
        if self._cue not in shared:
            raise _UnlocatedError(REWRITES)
        return shared[: shared.rindex(self._cue) + len(self._cue)] if self._cue else shared.rstrip(" ")

    def _marked_span(self, messages: Sequence[Mapping[str, str]], whole: str, index: int) -> tuple[int, int]:
        """The same where the template writes the turns up to this one otherwise, as where it drops earlier reasoning.

        Marks in place of the content, and of the message before, show what the template writes around them. The header is what the
        turn shares with the prompt for an answer, in one of the template's modes: all of that prompt, or all that precedes the content.
        """
        if not index or not self._cue:
            raise _UnlocatedError(REWRITES)
        (before, after), (_, turn) = (self._around(messages, place) for place in (index, index - 1))
        begin, fixed = len(whole) - len(turn), len(_common_start(whole, before))
        if not (whole.endswith(turn) and whole.endswith(after) and begin <= fixed):
            raise _UnlocatedError(REWRITES)
        end = len(whole) - len(after) + self._length_of_end(messages[: index + 1], after)
        for mode in ({}, {"enable_thinking": False}):
            _, prompt = self._around(messages[:index], index - 1, prompt=True, **mode)
            header = len(_common_start(prompt, whole[begin:fixed]))
            if header in (len(prompt), fixed - begin):
                return begin + header, end
        raise _UnlocatedError(REWRITES)

    def _around(self, messages: Sequence[Mapping[str, str]], index: int, **options: bool) -> tuple[str, str]:
        """What the template writes before and after the content of a message."""
        marked = [*messages]
        marked[index] = {**messages[index], "content": MARK}
        parts = self.render(marked, **options).split(MARK)
        if len(parts) != 2:
            raise _UnlocatedError(REWRITES)
        return parts[0], parts[1]

    def _length_of_end(self, messages: Sequence[Mapping[str, str]], after: str) -> int:
        """Of what ends the last message, in the text `after` its content: as where no other follows, else a token of its own."""
        _, end = self._around(messages, len(messages) - 1)
        tokens = sorted(self._tokenizer.get_added_vocab(), key=len, reverse=True)
        ends = [end, end.removesuffix(self._tokenizer.eos_token or ""), *(tokens if end else ())]
        known = next((text for text in ends if after.startswith(text) and (text or not end)), None)
        if known is None:
            raise _UnlocatedError(REWRITES)
        return len(known)

    @cached_property
    def _cue(self) -> str:
        """The end of the prompt for an answer; empty for a template without one."""
        plain, prompted = (self.render([{"role": "user", "content": "A"}], prompt) for prompt in (False, True))
        return prompted[len(_common_start(plain, prompted)) :]


def _common_start(*texts: str) -> str:
    return commonprefix(texts)  # noqa: RUF071 - of characters, as wanted here


class _Encoder:
    """examples → (input_ids, labels), for one tokenizer and one form of data."""

    def __init__(self, tokenizer: Any, form: DataForm, classes: list[str] | None) -> None:
        self._tokenizer, self._chat = tokenizer, Chat(tokenizer)
        self.form = form
        self._class_index = {name: index for index, name in enumerate(classes or [])}
        self.is_classification = form == "classification"

    def __call__(self, examples: Iterable[Example]) -> Iterator[tuple[Example, list[EncodedSequence]]]:
        """Each example with its sequences: two of a preference pair, one of any other."""
        waiting: list[tuple[Example, list[_Text]]] = []
        size = 0
        for example in examples:
            waiting.append((example, self._texts(example)))
            size += sum(COST_OF_TEXT + len(text.text) for text in waiting[-1][1])
            if size > AT_ONCE:
                yield from self._encoded(waiting)
                waiting, size = [], 0
        yield from self._encoded(waiting)

    def _encoded(self, waiting: list[tuple[Example, list[_Text]]]) -> Iterator[tuple[Example, list[EncodedSequence]]]:
        tokenised = self._tokenised([text for _, texts in waiting for text in texts])
        for example, texts in waiting:
            sequences = [next(tokenised) for _ in texts]
            if self.is_classification:
                sequences = [(ids, [self._class_index[str(example.content["label"])]]) for ids, _ in sequences]
            yield example, _with_common_start(sequences) if self.form == "preference" else sequences

    def _texts(self, example: Example) -> list[_Text]:
        """The texts of an example's sequences."""
        content, where = example.content, example.where
        if self.form == "messages":
            return [self._conversation(content["messages"], 0, where)]
        if self.form == "preference":
            return [self._answered(content["prompt"], content[name], where) for name in ("chosen", "rejected")]
        if self.form == "prompt_completion" and (content["completion"] != "" or isinstance(content["prompt"], list)):
            return [self._answered(content["prompt"], content["completion"], where)]
        return [_Text(content.get("text", ""), ended=not self.is_classification)]

    def _answered(self, prompt: Any, answer: Any, where: str) -> _Text:
        """Prompt and answer as one text, with labels on the answer and on the end-of-sequence token after it."""
        if isinstance(prompt, list) and isinstance(answer, list):
            return self._conversation([*prompt, *answer], len(prompt), where)
        if isinstance(prompt, list) or isinstance(answer, list):
            raise DataError(
                f"{where}: `prompt` and `completion` have different types; give two strings or two lists of messages"
            )
        return _Text(prompt + answer, [(len(prompt), len(prompt + answer))], ended=True)

    def _conversation(self, messages: Sequence[Mapping[str, str]], first: int, where: str) -> _Text:
        """Labels on every assistant turn from message `first` on, without its header, and on what ends the turn."""
        if not self._tokenizer.chat_template:
            raise DataError(
                f"{where}: the row has messages but the tokenizer has no chat template; give `prompt` and `completion` of text"
            )
        try:
            return self._labelled(messages, first)
        except TemplateError as error:
            raise DataError(
                f"{where}: the chat template refuses the conversation ({error}); leave the row out, or give `prompt` and `completion`"
            ) from None
        except _UnlocatedError as error:
            raise DataError(
                f"{where}: the chat template {error}; give `prompt` and `completion`, one row a turn"
            ) from None

    def _labelled(self, messages: Sequence[Mapping[str, str]], first: int) -> _Text:
        whole = self._chat.render(messages)
        spans: list[tuple[int, int]] = []
        answer = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index < first:
                continue
            spans.append(self._chat.span(messages, whole, index))
            answer = message["content"]
        turn = whole[spans[-2][1] if spans[1:] else 0 : spans[-1][1]] if spans else ""
        if "".join(answer.split()) not in "".join(turn.split()):
            raise _UnlocatedError("leaves a part of the last answer out, such as its reasoning")
        return _Text(whole, spans, special=False)

    def _tokenised(self, texts: Iterable[_Text]) -> Iterator[EncodedSequence]:
        for (special, located), group in groupby(texts, key=lambda text: (text.special, text.spans is not None)):
            alike = list(group)
            if located and not self._tokenizer.is_fast:
                raise DataError(
                    "completions are located by character offsets, which this slow tokenizer lacks; give `text`, or a fast tokenizer"
                )
            encoded = self._tokenizer(
                [text.text for text in alike],
                add_special_tokens=special,
                return_offsets_mapping=located,
                return_attention_mask=False,
                verbose=False,
            )
            offsets = encoded["offset_mapping"] if located else repeat(())
            for text, ids, places in zip(alike, encoded["input_ids"], offsets, strict=False):
                labels = text.labels(ids, places)
                if not text.ended:
                    yield ids, labels
                elif text.text or located:
                    ended = self._end(ids)
                    yield ended, labels + ended[len(ids) :]
                else:
                    yield [], []  # nothing is learned from an empty text

    def _end(self, ids: list[int]) -> list[int]:
        """`ids` with the end-of-sequence token, unless the tokenizer has none or has added it."""
        end = self._tokenizer.eos_token_id
        if end is None or not ids or ids[-1] == end:
            return list(ids)
        return [*ids, end]


def _with_common_start(pair: list[EncodedSequence]) -> list[EncodedSequence]:
    """The chosen and the rejected answer of a preference pair with labels that begin at the same position, as in TRL.

    Where a token across the border belongs to one answer alone, the other takes the prompt's last token as a label.
    """
    begins = [
        next((place for place, label in enumerate(labels) if label != IGNORED), len(labels)) for _, labels in pair
    ]
    first = slice(min(begins), max(begins))
    for ids, labels in pair:
        labels[first] = ids[first]
    return pair


EXAMPLE_METRICS: dict[str, tuple[str, ...]] = {  # that every evaluation gives for each example, beside the loss
    "classification": ("accuracy",),
    "preference": ("reward_accuracy", "reward_margin", "chosen_log_ratio"),
}


@dataclass(frozen=True, slots=True)
class EncodedData:
    """The encoded splits, and a summary of what was truncated and dropped."""

    splits: Mapping[SplitName, TokenStore]
    texts: Mapping[SplitName, Sequence[Example]]  # the held-out examples, for generation
    summary: DataSummary
    # Of the held-out examples; None: ungrouped.
    groups: Mapping[SplitName, list[int] | None] = field(default_factory=dict)

    @property
    def is_classification(self) -> bool:
        return self.summary.form == "classification"

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(int(examples.longest_sequences.max(initial=0)) for examples in self.splits.values())

    def loss_weight(self, example: EncodedExample) -> int:
        """What an example counts in a mean loss: its labels, or 1 where the loss is one of the whole example."""
        return _label_count(example) if self.summary.loss_kind == "token_loss" else 1


def encode(data: DataSplits, model: LoadedModel, settings: SelectSettings, folder: Path | None = None) -> EncodedData:
    """Tokenise every split, into temporary files in `folder`.

    Raises:
        DataError: the chat template is missing or rewrites earlier turns, or a split has no label within `seq_len`.
    """
    limit = settings.seq_len
    encoder = _Encoder(model.tokenizer, data.form, data.summary.classes)
    splits: dict[SplitName, TokenStore] = {}
    summaries: dict[str, SplitSummary] = {}
    for split in SPLITS:
        count = _Count()
        pieces = _encode_split(encoder, data.examples[split], limit, count)
        encoded = TokenStore(pieces, folder)
        if not encoded and data.examples[split]:
            equal = f", {count.equal} whose answers are the same there" if count.equal else ""
            first = f", the first at {count.first_left_out}" if count.first_left_out else ""
            raise DataError(
                f"the {split_name(split)} split has no label token left after tokenising ({len(data.examples[split])} examples, "
                f"{count.dropped} without a label within {limit} tokens{equal}{first}); give examples with text to learn, or a larger seq_len"
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
    texts = {split: data.examples[split] for split in HELD_OUT}
    groups: dict[SplitName, list[int] | None] = {}
    for split, given in texts.items():
        by_id = {example.item_id: example for example in given}
        groups[split] = group_numbers(by_id[example.item_id] for example in splits[split])
    count_of_groups = len(set(groups["selection"] or ()))
    summary = data.summary.model_copy(update={"splits": summaries, "groups": count_of_groups})
    return EncodedData(splits, texts, summary, groups)


@dataclass(slots=True)
class _Count:
    """Counts over a split's examples, updated while they are encoded."""

    label_tokens: int = 0
    truncated: int = 0
    dropped: int = 0  # examples without a label within the limit
    equal: int = 0  # pairs whose sequences are the same within the limit
    first_left_out: str = ""  # file and row


def _encode_split(
    encoder: _Encoder, examples: Iterable[Example], limit: int, count: _Count
) -> Iterator[EncodedExample]:
    """The examples within the limit, without those of which nothing can be learned there."""
    for example, sequences in encoder(examples):
        count.truncated += any(len(ids) > limit for ids, _ in sequences)
        within = [(ids[:limit], labels[:limit]) for ids, labels in sequences]
        first, *second = [ids for ids, _ in within]
        if not all(ids if encoder.is_classification else _count_of(labels) for ids, labels in within):
            count.dropped += 1
        elif second == [first]:
            count.equal += 1
        else:
            ids, labels = (list(chain.from_iterable(parts)) for parts in zip(*within, strict=True))
            encoded = EncodedExample(example.item_id, ids, labels, len(first) if second else 0)
            count.label_tokens += 1 if encoder.is_classification else _label_count(encoded)
            yield encoded
            continue
        count.first_left_out = count.first_left_out or example.where
