"""YAML 1.2 by PyYAML, whose own dialect is YAML 1.1; from anybody: what it grows to is bounded."""

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
_MATCHES = {name: re.compile(f"(?:{pattern})\\Z") for name, (pattern, _) in _IMPLICIT.items()}
MOST_BYTES = 1 << 20
"""Of a file: recipes have some thousands."""
_MOST_WEIGHT = 1 << 20
"""Of a document with its aliases written out: each value weighs `_NODE_WEIGHT` and its characters."""
_NODE_WEIGHT = 32
_MOST_DEPTH = 50
_MOST_DIGITS = 300
"""Of a whole number: what has more is beyond all floats."""


class Loader(yaml.SafeLoader):
    """What looks like a number is that number, and all else is text.

    PyYAML's own YAML 1.1 reads 0100 as 64, 1:30 as 90, 2024-01-01 as a date, `no` as false, and 1e-4 as text.

    A document that loops, nests deep, or grows large with its aliases written out is refused while it is composed:
    a line of aliases of aliases has as many values as there are atoms.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - mypy: PyYAML's is no ClassVar
    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = self._weight = 0
        self._extents: dict[int, tuple[int, int]] = {}
        """Weight and depth of each node that is complete, by its id."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._extents:
                what = f"*{str(event.anchor)[:40]} holds itself"
                raise yaml.composer.ComposerError(None, None, what, event.start_mark)  # type: ignore[arg-type]
            return node
        self._depth += 1
        if self._depth > _MOST_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested more than {_MOST_DEPTH} deep", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None:
            self._extents[id(node)] = self._extent(node)
            self._weight += _NODE_WEIGHT  # of lists that are not complete yet, too
            if self._weight > _MOST_WEIGHT:
                raise yaml.composer.ComposerError(None, None, "it has too many values", event.start_mark)
        return node

    def _extent(self, node: yaml.Node) -> tuple[int, int]:
        if isinstance(node, yaml.ScalarNode):
            return _NODE_WEIGHT + len(node.value), 1
        pairs = node.value if isinstance(node, yaml.MappingNode) else ((item,) for item in node.value)
        inner = [self._extents[id(item)] for pair in pairs for item in pair]
        weight = _NODE_WEIGHT + sum(weight for weight, _ in inner)
        depth = 1 + max((depth for _, depth in inner), default=0)
        if weight > _MOST_WEIGHT or depth > _MOST_DEPTH:
            what = "it grows too large" if weight > _MOST_WEIGHT else f"it is nested more than {_MOST_DEPTH} deep"
            raise yaml.composer.ComposerError(None, None, f"{what} (its aliases written out)", node.start_mark)
        return weight, depth


def _plain(loader: Loader, node: yaml.ScalarNode, kind: str) -> str:
    """The text of a value that is of this kind by how it is written: a tag (`!!float x`) may say something else."""
    text = str(loader.construct_scalar(node))
    if _MATCHES[kind].match(text) is None:
        raise yaml.constructor.ConstructorError(None, None, f"{text[:40]!r} is no {kind}", node.start_mark)
    return text


def _construct_int(loader: Loader, node: yaml.ScalarNode) -> int:
    text = _plain(loader, node, "int")
    if len(text) > _MOST_DIGITS:
        raise yaml.constructor.ConstructorError(None, None, f"a number of {len(text)} digits", node.start_mark)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _construct_float(loader: Loader, node: yaml.ScalarNode) -> float:
    text = _plain(loader, node, "float").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _construct_bool(loader: Loader, node: yaml.ScalarNode) -> bool:
    return _plain(loader, node, "bool").lower() == "true"


class Dumper(yaml.SafeDumper):
    """Puts quotes around text that our loader, or another's YAML 1.1, would read as something else."""


Loader.add_constructor(_TAG + "int", _construct_int)
Loader.add_constructor(_TAG + "float", _construct_float)
Loader.add_constructor(_TAG + "bool", _construct_bool)
for _name, (_, _first) in _IMPLICIT.items():
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(_TAG + _name, _MATCHES[_name], _first)
