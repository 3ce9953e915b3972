"""One path of configuration: YAML, then overrides, then a strict typed config, or an error that names the key.

Every config section derives from `Section`. Values are validated in JSON mode: a list may fill a tuple and a
string may fill a path, but `"3"` is no integer and an unknown key is an error.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from mepa_ds.config.yaml12 import MOST_BYTES, Dumper, Loader
from mepa_ds.errors import UserError
from mepa_ds.files import read_file
from mepa_ds.safety.secrets import redacted

_MOST_PARTS = 20
"""Of a dotted key: recipes have three."""
_MOST_TOLD = 20
_MOST_SHOWN = 200


class Section(BaseModel):
    """Base of all config sections: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


ConfigT = TypeVar("ConfigT", bound=Section)


def read_text(path: Path, what: str, most_bytes: int = MOST_BYTES) -> str:
    """Raises UserError for a file that cannot be read, is no regular file, is too large, or is not UTF-8."""
    try:
        return read_file(path, most_bytes).decode("utf-8").replace("\r\n", "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot read {what}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot read {what}: it is no UTF-8 text ({error}); save it as UTF-8") from error
    except ValueError as error:
        raise UserError(f"{path}: cannot read {what}: {error}; give a smaller file") from error


def parse_yaml(text: str, where: str) -> Any:
    """Raises UserError for what is no YAML, for what loops, nests deep or grows large (`Loader`), and for keys that are
    given twice: PyYAML takes the last one, and with it drops a whole section without a word.
    """
    if len(text) > MOST_BYTES:
        raise UserError(
            f"{where[:_MOST_SHOWN]}: {len(text)} characters of YAML, more than the {MOST_BYTES} that are read"
        )
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        _refuse_repeated_keys(node, set())
        return None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last: an escape far beyond Unicode
        is_star = any(words in str(error) for words in ("scanning an alias", "undefined alias"))
        remedy = '; a text that begins with * stands in quotes, such as ["*.bias"]' if is_star else ""
        raise UserError(f"{where}: not valid YAML: {error}{remedy}") from error


def _refuse_repeated_keys(node: yaml.Node | None, visited: set[int]) -> None:
    """As they are written: merged mappings (<<) may have the same keys."""
    if node is None or id(node) in visited:  # an anchor's node stands at its aliases too
        return
    visited.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated_keys(item, visited)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value[:40]!r} is given twice", key.start_mark
                )
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
            _refuse_repeated_keys(value, visited)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    data = parse_yaml(read_text(path, "the recipe"), str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of sections, got {type(data).__name__}")
    return data


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Sets `a.b.c=value` pairs in a copy of `data`; values are YAML (`x=[1,2]`, `x=1e-4`, `x=null`)."""
    result = json.loads(json.dumps(data))
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key or key.startswith("-"):
            raise UserError(f"{override!r}: an override has the form section.key=value, such as optim.base_lr=1e-4")
        set_key(result, key, _value_of(value, override), repr(override))
    return result


def set_key(data: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Sets `a.b.c` in nested mappings, and makes sections that are not there.

    Raises UserError for a key below a value; the message begins with `where`.
    """
    *parents, leaf = key.split(".")
    if len(parents) >= _MOST_PARTS:
        raise UserError(f"{where[:_MOST_SHOWN]}: a key of {len(parents) + 1} parts; those of recipes have up to three")
    for parent in parents:
        child = data.get(parent)
        if child is None:
            child = data[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"{where}: {parent!r} is a value, not a section")
        data = child
    data[leaf] = value


def _value_of(text: str, override: str) -> Any:
    """Raises UserError where YAML would take less than what is written: a value that is null or cut without a word."""
    value = parse_yaml(text, override)
    end = max(token.end_mark.index for token in yaml.scan(text) if not isinstance(token, yaml.StreamEndToken))
    if comment := text[end:].strip():
        raise UserError(f"{override!r}: {comment!r} would be a comment; put the value in quotes: key='\"...\"'")
    if value is None and text.strip() not in ("null", "Null", "NULL", "~"):
        raise UserError(f"{override!r}: there is no value; key=null turns something off, key='\"\"' is an empty text")
    return value


def validate(config_type: type[ConfigT], data: dict[str, Any], where: str) -> ConfigT:
    """Builds the typed config or raises one UserError that lists every faulty key."""
    try:
        return config_type.model_validate_json(json.dumps(data))
    except ValidationError as error:
        details = error.errors()
        lines = [_explain(config_type, detail) for detail in details[:_MOST_TOLD]]
        if len(details) > _MOST_TOLD:
            lines.append(f"and {len(details) - _MOST_TOLD} more")
        raise UserError(f"{where}: " + ("\n  ".join(["", *lines]) if len(lines) > 1 else lines[0])) from None


def load_config(config_type: type[ConfigT], path: Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Reads a recipe, applies command-line overrides and validates.

    Raises UserError also for a recipe that holds a secret.
    """
    data = apply_overrides(read_yaml(path), overrides)
    for key, text in _texts(data):
        if redacted(text) != text:
            raise UserError(
                f"{path}: {key}: it holds a secret: a token, a password, or an address with a signature. A recipe is "
                "copied into runs, reports and cards; take the secret out of it and set the variable of the library "
                "that wants it (HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY...); mepa data remote keeps addresses"
            )
    return validate(config_type, data, str(path))


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The texts of a recipe, by dotted keys."""
    if isinstance(value, str):
        yield key, value
    for inner, item in value.items() if isinstance(value, dict) else ():
        yield from _texts(item, f"{key}.{inner}" if key else str(inner))
    for item in value if isinstance(value, list) else ():
        yield from _texts(item, key)


def _explain(config_type: type[Section], detail: ErrorDetails) -> str:
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location)
    if detail["type"] == "extra_forbidden":
        known = _fields_at(config_type, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if detail["type"] == "missing":
        return f"{key}: required, but not given"
    message = detail["msg"].removeprefix("Value error, ")
    if not key:  # a model-wide check names its own keys
        return message
    given = "" if detail["type"] == "value_error" else f" (given: {_shortened(repr(detail['input']))})"
    return f"{key}: {message}{_hint(detail['type'], detail['input'])}{given}"


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _hint(kind: str, given: Any) -> str:
    """How to write what was probably meant."""
    if kind == "string_type" and given is None:
        return "; null is none, and neither is ~ alone"
    if kind == "string_type" and isinstance(given, (bool, int, float, dict)):
        return "; put text in quotes"
    if kind == "bool_type" and str(given).lower() in ("yes", "no", "on", "off", "0", "1"):
        return ", true or false"
    if kind == "int_type" and isinstance(given, float) and given.is_integer():
        return f", such as {given:.0f}"
    return ""


def _section_type(annotation: Any) -> type[Section] | None:
    """The Section inside `Section`, `Section | None` or `Annotated[...]`, if any."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in typing.get_args(annotation):
        if (found := _section_type(argument)) is not None:
            return found
    return None


def _fields_at(config_type: type[Section], location: Sequence[str]) -> list[str]:
    node: type[Section] | None = config_type
    for part in location:
        field = node.model_fields.get(part) if node else None
        node = _section_type(field.annotation) if field else None
    return list(node.model_fields) if node else []


@dataclass(frozen=True)
class Key:
    """What a person may want to know of one key. A section (`is_section`) has keys of its own, which follow it."""

    name: str
    """Dotted, such as `train.global_batch`."""
    meaning: str
    type: str = ""
    default: str = ""
    """As one would write it, or `required`."""
    is_section: bool = False
    may_be_null: bool = False


def keys_of(config_type: type[Section], prefix: str = "") -> Iterator[Key]:
    """Yields all keys of a recipe, depth first, in the order of the types."""
    for name, field in config_type.model_fields.items():
        dotted, meaning = f"{prefix}{name}", _one_line(field.description)
        section = _section_type(field.annotation)
        if section is None:
            required = field.default is PydanticUndefined
            default = "required" if required else json.dumps(field.default, default=str)
            yield Key(dotted, meaning, _type_name(field.annotation), default)
        else:
            may_be_null = type(None) in typing.get_args(field.annotation)
            yield Key(dotted, meaning, is_section=True, may_be_null=may_be_null)
            yield from keys_of(section, f"{dotted}.")


def describe(config_type: type[Section]) -> Iterator[str]:
    """Yields lines of --help: dotted name, type, default, meaning of each key."""
    for key in keys_of(config_type):
        if key.is_section:
            yield f"\n  {key.name}: {key.meaning}{' (null turns it off)' if key.may_be_null else ''}"
        else:
            yield f"  {key.name}  {key.type} = {key.default}\n      {key.meaning}"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join("null" if a is type(None) else _type_name(a) for a in arguments)
    if origin in (tuple, list):
        return f"list of {_type_name(arguments[0])}"
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    return getattr(annotation, "__name__", str(annotation)).lower().removeprefix("posix")


def dump_yaml(config: Section) -> str:
    """The resolved config as YAML, ready to be used as a recipe."""
    return yaml.dump(json.loads(config.model_dump_json()), Dumper=Dumper, sort_keys=False)
