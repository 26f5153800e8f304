"""Labels of encoded examples."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from rightrank.bases.base_models import load_base
from rightrank.data.splits import load_data
from rightrank.data.token_store import IGNORED
from rightrank.evaluation.tokens import encode_splits
from rightrank.schema.errors import DataError
from tests.evaluation.chat_templates import MARKED, OTHERWISE, PLAIN, REASONED, REWRITING, trl_templates
from tests.tiny import CHAT_TEMPLATE, ON_CPU, build_small_settings, generate_sentences, make_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> Any:
    return load_base(str(model_folder), ON_CPU, None)


def labelled_text(loaded: Any, item: Any) -> str:
    text: str = loaded.tokenizer.decode([label for label in item.labels if label != IGNORED])
    return text


def encode_rows(loaded: Any, rows: list[dict[str, Any]], path: Path, **changes: Any) -> Any:
    settings = build_small_settings(**({"seq_len": 100} | changes))
    return encode_splits(load_data(write_jsonl(path / "d.jsonl", rows), settings), loaded, settings)


def test_every_assistant_turn_and_nothing_else_is_labelled(loaded: Any, tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": text},
                {"role": "assistant", "content": "first"},
                {"role": "user", "content": "again"},
                {"role": "assistant", "content": "second"},
            ]
        }
        for text in generate_sentences(80)
    ]
    data = encode_rows(loaded, rows, tmp_path)
    for item in data.splits["train"]:
        assert labelled_text(loaded, item) == "first<|im_end|>\nsecond<|im_end|>\n"


TURNS = ("ua", "sua", "uaua", "suaua", "a", "aua", "saua")  # system, user, assistant
ROLES = {"s": "system", "u": "user", "a": "assistant"}


def conversations() -> list[list[dict[str, str]]]:
    words = iter(generate_sentences(1000))
    return [[{"role": ROLES[turn], "content": next(words)} for turn in turns] for turns in TURNS * 8]


def mask_by_template(tokenizer: Any, messages: Any) -> tuple[list[int], list[int]]:
    """Return `(token ids, labels)` from the markers of a template, as TRL's `assistant_only_loss` computes them."""
    tokens = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids = list(tokens["input_ids"])
    return ids, [token if mask else IGNORED for token, mask in zip(ids, tokens["assistant_masks"], strict=True)]


def test_labels_are_those_of_assistant_only_loss(loaded: Any) -> None:
    for name in [*MARKED, *trl_templates()]:
        plain, marked = (MARKED | trl_templates())[name]
        tokenizer = make_tokenizer()
        tokenizer.bos_token, tokenizer.chat_template = "<unk>", marked
        expected, refused = [], []
        for messages in conversations():
            try:
                expected.append((messages, *mask_by_template(tokenizer, messages)))
            except TemplateError:
                refused.append(messages)
        tokenizer.chat_template = plain
        base = replace(loaded, tokenizer=tokenizer)
        rows = [{"messages": messages} for messages, *_ in expected]
        splits = {"train": rows, "validation": rows[:4], "test": rows[:4]}
        settings = build_small_settings(seq_len=1000)
        data = encode_splits(load_data(splits, settings), base, settings)
        assert [(list(item.input_ids), list(item.labels)) for item in data.splits["train"]] == [
            row[1:] for row in expected
        ]
        if refused:
            refusing = load_data(splits | {"train": [*rows, {"messages": refused[0]}]}, settings)
            with pytest.raises(DataError, match="the chat template rejects the conversation"):
                encode_splits(refusing, base, settings)


def collect_labelled_texts(tokenizer: Any, labels: list[int]) -> list[str]:
    """Return the texts of consecutive labels."""
    groups = groupby(labels, key=lambda label: label != IGNORED)
    return [tokenizer.decode(list(group)) for is_label, group in groups if is_label]


def encoded_conversations(loaded: Any, template: str, rows: list[list[dict[str, str]]]) -> tuple[Any, list[list[str]]]:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>", "<|return|>"]})
    tokenizer.bos_token, tokenizer.chat_template = "<unk>", template
    splits = {name: [{"messages": messages} for messages in rows] for name in ("train", "validation", "test")}
    settings = build_small_settings(seq_len=1000)
    data = encode_splits(load_data(splits, settings), replace(loaded, tokenizer=tokenizer), settings)
    items = list(data.splits["train"])
    for item, messages in zip(items, rows, strict=True):
        assert tokenizer.decode(item.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    return tokenizer, [collect_labelled_texts(tokenizer, item.labels) for item in items]


def test_labels_where_the_template_writes_earlier_turns_otherwise(loaded: Any) -> None:
    for name in REWRITING:
        template, *expected = REWRITING[name]
        for messages, answers in zip((REASONED, PLAIN), expected, strict=True):
            rows = [
                [
                    {**message, "content": f"{n} {message['content']}"} if message["role"] == "user" else message
                    for message in messages
                ]
                for n in range(4)
            ]
            if isinstance(answers, str):
                with pytest.raises(
                    DataError, match=f"the chat template {answers}.*; give `prompt` and `completion`, with one row per"
                ):
                    encoded_conversations(loaded, template, rows)
            else:
                assert encoded_conversations(loaded, template, rows)[1] == [answers] * 4


def test_labels_lie_within_those_of_trl(loaded: Any) -> None:
    """Compare with TRL, whose labels begin at the header or at a `<think>` of the prompt for an answer; both end at the same token."""
    for name in trl_templates(OTHERWISE):
        plain, marked = trl_templates(OTHERWISE)[name]
        begins = (["user", "assistant"], ["system", "user"])
        rows = [messages for messages in conversations() if [message["role"] for message in messages[:2]] in begins]
        tokenizer, ours = encoded_conversations(loaded, plain, rows)
        texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in rows]
        tokenizer.chat_template = marked
        compared = 0
        for messages, text, answers in zip(rows, texts, ours, strict=True):
            if text != tokenizer.apply_chat_template(messages, tokenize=False):
                continue  # in TRL's templates of some families earlier turns keep their reasoning
            theirs = collect_labelled_texts(tokenizer, mask_by_template(tokenizer, messages)[1])
            prefixes = {their.removesuffix(our) for our, their in zip(answers, theirs, strict=True)}
            assert prefixes <= {"", "<｜Assistant｜>", "<|start|>assistant", "<think></think>", "<think>\n"}, prefixes
            compared += 1
        assert compared >= 8


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "required": ["a"]}}}
WITH_TOOLS = "{% if tools %}<|im_start|>tools {{ tools | tojson }}<|im_end|>\n{% endif %}" + CHAT_TEMPLATE
WITH_DOCUMENTS = "{% for d in documents %}{{ d.title }}: {{ d.text }}\n{% endfor %}" + CHAT_TEMPLATE


def make_chat_row(form: str, number: int) -> dict[str, Any]:
    question, answer, other = (
        [{"role": role, "content": f"{content} {number}"}]
        for role, content in (("user", "add"), ("assistant", "yes"), ("assistant", "no"))
    )
    return {
        "messages": {"messages": [*question, *answer]},
        "completion": {"prompt": question, "completion": answer},
        "preference": {"prompt": question, "chosen": answer, "rejected": other},
        "conversations": {
            "conversations": [{"from": "human", "value": f"add {number}"}, {"from": "gpt", "value": "yes"}]
        },
    }[form]


def test_the_chat_template_receives_tools_and_documents(loaded: Any) -> None:
    for form, template, inputs, cell in [
        ("messages", WITH_TOOLS, {"tools": [TOOL]}, [TOOL]),
        ("completion", WITH_TOOLS, {"tools": [TOOL]}, json.dumps([TOOL])),
        ("preference", WITH_TOOLS, {"tools": [TOOL]}, [TOOL | {"strict": None}]),  # as Arrow reads different keys
        ("conversations", WITH_DOCUMENTS, {"documents": [{"title": "t", "text": "x"}]}, [{"title": "t", "text": "x"}]),
    ]:
        tokenizer, (column,) = make_tokenizer(), inputs
        base, settings = replace(loaded, tokenizer=tokenizer), build_small_settings(seq_len=1000)
        rows = [make_chat_row(form, number) | {column: cell} for number in range(60)]
        tokenizer.chat_template = template
        turn = {"role": "user", "content": ""}
        beginning = tokenizer.apply_chat_template([turn], tokenize=False, **inputs).removesuffix("<|im_end|>\n")
        data = encode_splits(load_data(rows, settings), base, settings)
        for item in data.splits["train"]:
            assert tokenizer.decode(item.input_ids).startswith(beginning)
            assert re.sub(r"[ 0-9]|<\|im_end\|>\n", "", labelled_text(loaded, item)) in ("yes", "yesno")
        tokenizer.chat_template = CHAT_TEMPLATE
        with pytest.raises(DataError, match=f"the chat template does not use the column `{column}`.*ignore={column}"):
            encode_splits(load_data(rows, settings), base, settings)
        ignoring = build_small_settings(seq_len=1000, columns={"ignore": [column]})
        assert encode_splits(load_data(rows, ignoring), base, ignoring).splits["train"]


def test_long_examples_are_truncated_and_counted(loaded: Any, tmp_path: Path) -> None:
    rows = [{"text": text * 4} for text in generate_sentences(80)]
    data = encode_rows(loaded, rows, tmp_path, seq_len=16)
    summary = data.summary.splits["train"]
    assert summary.truncated > 0
    assert all(item.length <= 16 for split in data.splits.values() for item in split)


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        (lambda text: {"prompt": text * 8, "completion": "x"}, "", "no labels left after tokenising"),
        (lambda text: {"prompt": text, "completion": ""}, "", "no labels left"),
        (lambda text: {"messages": [{"role": "assistant", "content": text}]}, None, "no chat template"),
    ],
    ids=["labels beyond the limit", "empty", "no template"],
)
def test_rows_without_a_label_are_refused(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Any, template: str | None, message: str
) -> None:
    if template is None:
        monkeypatch.setattr(loaded.tokenizer, "chat_template", None)
    with pytest.raises(DataError, match=message):
        encode_rows(loaded, [row(text) for text in generate_sentences(80)], tmp_path, seq_len=8)
