"""YAML 1.2 by PyYAML, whose own dialect is YAML 1.1."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

_TAG = "tag:yaml.org,2002:"
_GROUPS = "[0-9]{1,3}(?:_[0-9]{3})+"
# YAML 1.2's core schema, and Python's 1_000. Whole numbers match the pattern of floats too, so they stand first.
_IMPLICIT = {
    "null": (r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (rf"[-+]?(?:[0-9]+|{_GROUPS})|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        rf"[-+]?(?:\.[0-9]+|(?:[0-9]+|{_GROUPS})(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    "merge": ("<<", ["<"]),
}


class Loader(yaml.SafeLoader):
    """What looks like a number is that number, and all else is text.

    PyYAML's own YAML 1.1 reads 0100 as 64, 1:30 as 90, 2024-01-01 as a date, `no` as false, and 1e-4 as text.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - mypy: PyYAML's is no ClassVar
    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in ("null", "bool", "int", "float", "str", "seq", "map")
    }


def _construct_int(loader: Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


class Dumper(yaml.SafeDumper):
    """Puts quotes around text that our loader, or another's YAML 1.1, would read as something else."""


Loader.add_constructor(_TAG + "int", _construct_int)
for _name, (_pattern, _first) in _IMPLICIT.items():
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})\\Z"), _first)
