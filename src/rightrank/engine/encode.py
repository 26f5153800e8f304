"""From examples to token ids and labels. A label is -100 wherever no loss is taken.

Prompt and completion are tokenised together, and the prompt is masked by character offsets: a token across the border
counts as completion, and the ids are those that the model sees at inference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rightrank.engine.encoder import IGNORED, Encoder, label_count
from rightrank.engine.token_store import EncodedExample, TokenStore, longest_sequence
from rightrank.errors import DataError
from rightrank.io.data import SPLITS, DataSplits
from rightrank.io.example_store import Example
from rightrank.io.models import LoadedModel
from rightrank.records import DataSummary, SplitName, SplitSummary
from rightrank.settings import SelectSettings

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
    vocabulary = model.model.get_input_embeddings().num_embeddings if data.form == "tokens" else 0
    encoder = Encoder(model.tokenizer, data.form, data.classes, vocabulary)
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
    encoder: Encoder, examples: Iterable[Example], limit: int, long_items: str, count: _Count
) -> Iterator[EncodedExample]:
    for example in examples:
        if encoder.form == "preference":
            encoded = _pair(encoder, example, limit, count)
        else:
            encoded = _pieces(encoder, example, limit, long_items == "split", count)
        if not encoded:
            count.first_left_out = count.first_left_out or example.where
        count.label_tokens += sum(encoder.labels_of(one) for one in encoded)
        yield from encoded


def _pieces(encoder: Encoder, example: Example, limit: int, split: bool, count: _Count) -> list[EncodedExample]:
    """The example within the limit, or all its pieces of that length; those without a label are left out."""
    ids, labels = encoder(example)
    count.truncated += len(ids) > limit
    found: list[EncodedExample] = []
    for start in range(0, max(len(ids), 1), limit) if split and not encoder.is_classification else (0,):
        suffix = f"#{start}" if start else ""
        piece_labels = labels if encoder.is_classification else labels[start : start + limit]
        piece = EncodedExample(example.item_id + suffix, ids[start : start + limit], piece_labels)
        if piece.input_ids and encoder.labels_of(piece):
            found.append(piece)
    count.dropped += not found
    return found


def _pair(encoder: Encoder, example: Example, limit: int, count: _Count) -> list[EncodedExample]:
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
