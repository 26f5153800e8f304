"""Chat templates written after the public ones of ten families, each plain and with markers around what the assistant writes.

Transformers masks by these markers, and so does TRL with `assistant_only_loss`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

_CUE = "{% if add_generation_prompt %}CUE{% endif %}"
_ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)
_CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nDEFAULT<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
_CHATML_CUE = _CUE.replace("CUE", "{{ '<|im_start|>assistant\n' }}")

_MARKED = {
    "chatml": _CHATML.replace("DEFAULT", "You are a helpful assistant.") + _CHATML_CUE,
    "chatml without a prompt": _CHATML.replace("DEFAULT", "You are a helpful assistant."),
    "smollm2": _CHATML.replace("DEFAULT", "You are a helpful AI assistant named SmolLM, trained by Hugging Face")
    + _CHATML_CUE,
    "qwen2.5": (
        "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
        "{%- else %}{{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}"
        "{%- endif %}{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}{% generation %}"
        "{{- m.content + '<|im_end|>\n' }}{% endgeneration %}{%- elif m.role == 'user' or not loop.first %}"
        "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}" + _CHATML_CUE
    ),
    "llama 3": (
        "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        + _CUE.replace("CUE", "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}")
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}" + _ALTERNATE + "{% if m['role'] == 'assistant' %}{{ '<start_of_turn>model\n' }}"
        "{% generation %}{{ m['content'] | trim + '<end_of_turn>\n' }}{% endgeneration %}"
        "{% else %}{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
        + _CUE.replace("CUE", "{{ '<start_of_turn>model\n' }}")
    ),
    "mistral": (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}{% set turns = messages[1:] %}"
        "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for m in turns %}"
        + _ALTERNATE
        + "{% if m['role'] == 'user' %}{{ ' [INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
        "{% else %}{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    ),
    "phi 3": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + '<|end|>\n' }}{% endgeneration %}{% else %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% elif messages[-1]['role'] == 'assistant' %}"
        "{% generation %}{{ eos_token }}{% endgeneration %}{% else %}{{ eos_token }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + eos_token + '\n' }}{% endgeneration %}{% else %}{{ m['content'] + eos_token + '\n' }}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
    ),
    "deepseek": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n\n' }}"
        "{% elif m['role'] == 'assistant' %}{{ 'Assistant:' }}{% generation %}{{ ' ' + m['content'] + eos_token }}"
        "{% endgeneration %}{% else %}{{ m['content'] + '\n\n' }}{% endif %}{% endfor %}"
        + _CUE.replace("CUE", "Assistant:")
    ),
    "falcon 3": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' }}{% generation %}{{ m['content'] }}"
        "{% if loop.last %}{{ eos_token }}{% endif %}{% endgeneration %}{% if not loop.last %}{{ '\n' }}{% endif %}"
        "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
    ),
    "granite": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|start_of_role|>system<|end_of_role|>You are Granite.<|end_of_text|>\n' }}"
        "{% endif %}{% for m in messages %}{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' }}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|end_of_text|>\n' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|end_of_text|>\n' }}{% endif %}{% endfor %}"
        + _CUE.replace("CUE", "{{ '<|start_of_role|>assistant<|end_of_role|>' }}")
    ),
}
MARKED = {name: (re.sub(r"{% (end)?generation %}", "", marked), marked) for name, marked in _MARKED.items()}


_THINKING = "{% set parts = m.content.split('</think>') %}{% set reason = parts[0].split('<think>')[-1].strip() if parts | length > 1 else '' %}"
_LAST_USER = "{% set last = namespace(user=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
_CHAT = "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}BODY{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
# Written after the public ones of families that write earlier turns otherwise than the last, each with what the assistant writes in
# `REASONED` and `PLAIN`; a text alone is what the refusal says.
REWRITING: dict[str, tuple[str, list[str] | str, list[str] | str]] = {
    "qwen 3": (
        _LAST_USER + "{% for m in messages %}" + _THINKING
        + _CHAT.replace(
            "BODY",
            "{{ '<think>\n' + reason + '\n</think>\n\n' if loop.index0 > last.user else '' }}{{ parts[-1].lstrip('\n') }}",
        )
        + _CHATML_CUE,
        ["one<|im_end|>\n", "<think>\ntwice\n</think>\n\ntwo<|im_end|>\n"],
        ["one<|im_end|>\n", "<think>\n\n</think>\n\ntwo<|im_end|>\n"],
    ),
    "nemotron 3": (
        _LAST_USER + "{% for m in messages %}" + _THINKING
        + _CHAT.replace(
            "BODY",
            "{{ '<think>\n' + reason + '\n</think>\n' if reason and loop.index0 > last.user else '<think></think>' }}{{ parts[-1].lstrip('\n') }}",
        )
        + _CUE.replace(
            "CUE", "{{ '<|im_start|>assistant\n' + ('<think></think>' if enable_thinking is false else '<think>\n') }}"
        ),
        ["one<|im_end|>\n", "twice\n</think>\ntwo<|im_end|>\n"],
        ["one<|im_end|>\n", "two<|im_end|>\n"],
    ),
    "deepseek r1": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|end of sentence|>' }}"
        "{% else %}{{ '<|User|>' + m.content }}{% endif %}{% endfor %}" + _CUE.replace("CUE", "{{ '<|Assistant|><think>\n' }}"),
        "omits some text of the last answer, such as its reasoning",
        ["one<|end of sentence|>", "two<|end of sentence|>"],
    ),
    "gpt-oss": (
        "{{ '<|start|>system<|message|>Knowledge: 2024<|end|>' }}{% for m in messages %}{{ '<|start|>' + m.role }}"
        "{% if m.role == 'assistant' %}{{ '<|channel|>final' }}{% endif %}{{ '<|message|>' + m.content }}"
        "{{ '<|return|>' if m.role == 'assistant' and loop.last and not add_generation_prompt else '<|end|>' }}{% endfor %}"
        + _CUE.replace("CUE", "{{ '<|start|>assistant' }}"),
        [
            "<|channel|>final<|message|><think>\nonce\n</think>\n\none<|end|>",
            "<|channel|>final<|message|><think>\ntwice\n</think>\n\ntwo<|return|>",
        ],
        ["<|channel|>final<|message|>one<|end|>", "<|channel|>final<|message|>two<|return|>"],
    ),
    "turns with numbers": (
        "{% for m in messages %}{{ '<' + m.role + ' of ' + messages | length | string + '>' + m.content }}{% endfor %}"
        + _CUE.replace("CUE", "{{ '<assistant of ' + (messages | length + 1) | string + '>' }}"),
        "rewrites earlier turns",
        "rewrites earlier turns",
    ),
    "another header in the past": (
        "{% for m in messages %}{{ '<' + m.role + ('>' if loop.last else ' before>') + m.content + '</s>' }}{% endfor %}"
        + _CUE.replace("CUE", "{{ '<assistant>' }}"),
        "rewrites earlier turns",
        "rewrites earlier turns",
    ),
    "an end that no token is": (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + ('. END' if loop.last else ' - ') }}{% endfor %}"
        + _CUE.replace("CUE", "{{ '<assistant>' }}"),
        "rewrites earlier turns",
        "rewrites earlier turns",
    ),
    "parts of text alone": (
        "{% for m in messages %}{{ '<' + m.role + '>' }}{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endfor %}"
        + _CUE.replace("CUE", "{{ '<assistant>' }}"),
        "omits some text of the last answer",
        "omits some text of the last answer",
    ),
}  # fmt: skip
PLAIN = [
    {"role": role, "content": text}
    for role, text in (("user", "say 1"), ("assistant", "one"), ("user", "say 2"), ("assistant", "two"))
]
REASONED = [
    message | ({"content": f"<think>\n{reason}\n</think>\n\n{message['content']}"} if reason else {})
    for message, reason in zip(PLAIN, ("", "once", "", "twice"), strict=True)
]


SAME = ("cohere", "gemma", "gemma3", "llama3", "phi3", "phi3_5", "qwen3_instruct_2507", "qwen3_vl")
OTHERWISE = (
    *("deepseek_r1_distill", "deepseekv3", "gptoss", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"),
    *("qwen3_5_think", "qwen3_6"),
)


def trl_templates(names: Sequence[str] = SAME) -> dict[str, tuple[str, str]]:
    """Return the templates of TRL, plain and with its markers.

    Those in `SAME` render the same text in both; those in `OTHERWISE` render earlier turns differently.
    """
    if find_spec("trl") is None:
        return {}
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    files = {name: (folder / f"{name}.jinja", folder / f"{name}_training.jinja") for name in names}
    return {
        f"trl {name}": (plain.read_text(encoding="utf-8"), marked.read_text(encoding="utf-8"))
        for name, (plain, marked) in files.items()
        if marked.exists()
    }
