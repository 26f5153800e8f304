"""Damage bytes: replace JSON values by ones that break readers, and apply random damage."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

# Values that break readers, as JSON text. Python's json module would not write some of them.
NASTY_JSON = (
    "null", "true", "0", "-1", "1e308", "-1e308", "1e-320", "1e999", "NaN", "-Infinity", "9007199254740993",
    "9" * 400, "9" * 5000, "-" + "9" * 5000, '""', '" "', '"\\ud800"', '"\\u0000"', '"\\u001b[2J"', '"\\u00b2"',
    '"\\u0661"', '"nan"', '"1e999"', '"-"', '"../../../etc/passwd"', '"/etc/passwd"', '"{"', '"{}"', '"$\\\\frac{"',
    '"</script><script>alert(1)</script>"', '"(a+)+$"', '"[1]"', '"' + "a" * 70_000 + '"', "[]", "{}", "[null]",
    "[[]]", '{"": 0}', '{"a": {"b": {"c": 1}}}', "[" * 3000 + "]" * 3000, '{"a":' * 1500 + "1" + "}" * 1500,
)  # fmt: skip
NASTY_BYTES = (
    b"\x00", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\r", b"\n", b"\n\n", b'"', b"'", b",", b"\t", b"{", b"}", b"[",
    b"]", b":", b"&a ", b"*a", b"!!python/object/apply:os.system [id]", b"!!binary x", b"<<: *a", b"2001-99-99",
    b"\xed\xa0\x80", b"\xc2\xb2", b"\xd9\xa1", b"1e999", b"nan", b"9" * 400, b"-", b"%", b"\x1b[2J",
    b"\xff" * 8, b"\x7f" + b"\xff" * 3,
)  # fmt: skip
_PLACE = "@nasty@"

Mutation = Callable[[bytes, random.Random, Sequence[bytes]], bytes]


def mutate(seeds: Sequence[bytes], generator: random.Random) -> bytes:
    """Return one of the seeds, damaged one to four times."""
    data = generator.choice(seeds)
    for _ in range(generator.choice((1, 1, 1, 2, 4))):
        data = damage(data, generator, seeds)
    return data


def damage(data: bytes, generator: random.Random, seeds: Sequence[bytes]) -> bytes:
    return generator.choice(MUTATIONS)(data, generator, seeds)


def _replace_json_value(data: bytes, generator: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Replace, drop or double one value in one line of JSON; in other data, damage bytes."""
    lines = data.split(b"\n")
    at = generator.randrange(len(lines))
    begin = min((position for position in (lines[at].find(b"{"), lines[at].find(b"[")) if position >= 0), default=-1)
    try:
        value = json.loads(lines[at][begin:])
    except (ValueError, RecursionError):
        return _insert(data, generator, seeds)
    changed = json.dumps(_replace_value(value, generator)).replace(f'"{_PLACE}"', generator.choice(NASTY_JSON))
    lines[at] = lines[at][:begin] + changed.encode("utf-8", "surrogatepass")
    return b"\n".join(lines)


def _replace_value(value: Any, generator: random.Random) -> Any:
    if isinstance(value, dict) and value and generator.random() < 0.9:
        name = generator.choice(list(value))
        if generator.random() < 0.1:
            return {key: inner for key, inner in value.items() if key != name}
        return value | {name: _replace_value(value[name], generator)}
    if isinstance(value, list) and value and generator.random() < 0.8:
        at = generator.randrange(len(value))
        if generator.random() < 0.1:
            return value[:at] + value[at + 1 :] if generator.random() < 0.5 else value + value[at:]
        return [*value[:at], _replace_value(value[at], generator), *value[at + 1 :]]
    return _PLACE


def _flip(data: bytes, generator: random.Random, _: Sequence[bytes]) -> bytes:
    if not data:
        return b"\x00"
    at = generator.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << generator.randrange(8))]) + data[at + 1 :]


def _insert(data: bytes, generator: random.Random, _: Sequence[bytes]) -> bytes:
    at = generator.randint(0, len(data))
    return data[:at] + generator.choice(NASTY_BYTES) + data[at:]


def _overwrite(data: bytes, generator: random.Random, _: Sequence[bytes]) -> bytes:
    at, nasty = generator.randint(0, len(data)), generator.choice(NASTY_BYTES)
    return data[:at] + nasty + data[at + len(nasty) :]


def _cut(data: bytes, generator: random.Random, _: Sequence[bytes]) -> bytes:
    begin, end = sorted((generator.randint(0, len(data)), generator.randint(0, len(data))))
    return data[:begin] + data[end:]


def _truncate(data: bytes, generator: random.Random, _: Sequence[bytes]) -> bytes:
    return data[: generator.randint(0, len(data))]


def _repeat(data: bytes, generator: random.Random, _: Sequence[bytes]) -> bytes:
    begin, end = sorted((generator.randint(0, len(data)), generator.randint(0, len(data))))
    return data[:end] + data[begin:end] * generator.choice((1, 2, 50)) + data[end:]


def _splice(data: bytes, generator: random.Random, seeds: Sequence[bytes]) -> bytes:
    other_seed = generator.choice(seeds)
    return data[: generator.randint(0, len(data))] + other_seed[generator.randint(0, len(other_seed)) :]


MUTATIONS: tuple[Mutation, ...] = (
    _replace_json_value, _replace_json_value, _replace_json_value, _replace_json_value, _flip, _insert, _overwrite, _cut, _truncate, _repeat, _splice,
)  # fmt: skip
