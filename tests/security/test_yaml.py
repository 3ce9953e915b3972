"""Recipes that grow, loop, nest or count without end are refused, in bounded time, with one message."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mepa_ds.config.base import apply_overrides, parse_yaml, read_yaml, validate
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.errors import UserError


def _bomb(first: str, line: str) -> str:
    return f"a0: &a0 {first}\n" + "".join(
        f"a{number}: &a{number} {line.format(f'*a{number - 1}')}\n" for number in range(1, 9)
    )


def _times_ten(form: str) -> str:
    return form.format(",".join(["{0}"] * 10))


HOSTILE = {
    "aliases": _bomb("[x,x,x,x,x,x,x,x,x,x]", _times_ten("[{}]")),
    "mappings": _bomb("{x: 1}", "{{" + ", ".join(f"k{n}: {{0}}" for n in range(10)) + "}}"),
    "merges": _bomb("{x: 1}", _times_ten("{{{{<<: [{}]}}}}")),
    "a long text, often": f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 5000)}]",
    "a chain": "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 5000)),
    "itself": "a: &a [*a]",
    "itself, deeper": "a: &a {b: {c: [1, *a]}}",
    "deep lists": "a: " + "[" * 100_000,
    "deep mappings": "a: " + "{a: " * 100_000,
    "deep blocks": "".join(" " * n + "a:\n" for n in range(1000)),
    "deep keys": "? " * 10_000,
    "many digits": "a: " + "9" * 500_000,
    "hexadecimal digits": "a: 0x" + "f" * 500_000,
    "many values": "a: [" + "1," * 400_000 + "]",
    "large": "a: '" + "x" * (1 << 21) + "'",
    "two anchors": "a: &a 1\nb: &a 2",
    "no anchor": "a: *b",
    "a tag of Python's": "a: !!python/object/apply:os.system [id]",
    "a bool that is none": "a: !!bool maybe",
    "a float that is none": 'a: !!float ""',
    "base 60": "a: !!float 1" + ":1" * 10_000,
    "an int that is none": 'a: !!int ""',
    "a list for a key": "? [1]\n: 2",
    "beyond Unicode": 'a: "\\UFFFFFFFF"',
    "control characters": "a: \x00",
    "an endless number": "a: " + "1" * 100_000 + "_",
}


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "an endless number"])
def test_a_hostile_recipe_is_one_message(name: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(HOSTILE[name])
    started = time.process_time()
    with pytest.raises(UserError) as refused:
        read_yaml(path)
    assert time.process_time() - started < 15
    assert len(str(refused.value)) < 2000


def test_what_looks_like_a_number_for_long_is_text_at_once() -> None:
    started = time.process_time()
    assert isinstance(parse_yaml(HOSTILE["an endless number"], "x")["a"], str)
    assert time.process_time() - started < 5


def test_aliases_may_be_used_as_ever() -> None:
    text = "a: &a {x: 1, y: [2, 3]}\nb: *a\nc: {<<: *a, x: 4}\nd: [*a, *a]"
    a = {"x": 1, "y": [2, 3]}
    assert parse_yaml(text, "x") == {"a": a, "b": a, "c": {**a, "x": 4}, "d": [a, a]}


def test_overrides_are_bounded_too() -> None:
    for override in ("a=" + "[" * 5000, "a=" + "9" * 100_000, "a." * 5000 + "b=1", "a=&a [*a]"):
        with pytest.raises(UserError) as refused:
            apply_overrides({}, [override])
        assert len(str(refused.value)) < 200_000


def test_what_never_ends_is_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", Path("/dev/zero")):
        with pytest.raises(UserError, match="not a regular file"):
            read_yaml(path)


def test_thousands_of_wrong_keys_are_told_in_some_lines() -> None:
    started = time.process_time()
    with pytest.raises(UserError, match=r"and [0-9]+ more") as refused:
        validate(PretrainConfig, {f"key{number}": "x" * 1000 for number in range(10_000)}, "recipe.yaml")
    assert len(str(refused.value)) < 20_000
    assert time.process_time() - started < 10
