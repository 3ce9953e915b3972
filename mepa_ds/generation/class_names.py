"""Names of classes: captions, words of file names, and what people write to choose classes."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterator, Sequence

from mepa_ds.errors import UserError

_ITEM = re.compile(r'\s*(?:"(?P<quoted>(?:[^"]|"")*)"\s*|(?P<plain>[^,]*))(?P<end>,|$)')
_RANGE = re.compile(r"([0-9]+)\s*(?:(-)\s*([0-9]+))?", re.ASCII)
_NEAREST, _MOST_LETTERS = 3, 40


def caption(label: int, names: Sequence[str]) -> str:
    """The class as a person reads it: `3 Dress`; `class 3` where the data have no name for it, or a mere number."""
    name = names[label] if label < len(names) else ""
    return f"class {label}" if name in ("", str(label)) else f"{label} {' '.join(name.split())}"


def file_word(label: int | None, names: Sequence[str]) -> str:
    """What a file's name says of the class: `class0003_Dress`; letters of ASCII, digits and single hyphens alone.
    `unconditional` of no class."""
    if label is None:
        return "unconditional"
    name = names[label] if label < len(names) else ""
    letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    word = re.sub(r"[^A-Za-z0-9]+", "-", letters)[:_MOST_LETTERS].strip("-")
    return f"class{label:04d}" if word == "" or name == str(label) else f"class{label:04d}_{word}"


def which_of(classes: Sequence[int], num_classes: int) -> str:
    """For titles of pictures: empty if all classes are shown, else `; 8 of 1000 classes`."""
    shown = len(set(classes))
    return "" if shown >= num_classes else f"; {shown} of {num_classes} classes"


def spread_classes(num_classes: int, most: int) -> list[int]:
    """Up to `most` classes, evenly over all."""
    count = min(num_classes, most)
    return [place * num_classes // count for place in range(count)]


def parse_classes(text: str, num_classes: int, names: Sequence[str] = (), option: str = "--classes") -> list[int]:
    """`all`, or numbers, ranges and names with commas between: `3,5-9,Ankle boot`.

    A name with a comma, or one that reads as a number, a range or `all`, stands in double quotes; a quote within them
    is doubled (as in CSV files). A name is found whatever the case of its letters, if that leaves one class.

    Raises:
        UserError: a number beyond the model's classes, an unknown name, or one that several classes have.
    """
    if text.strip() == "all":
        return list(range(num_classes))
    classes: list[int] = []
    for item, quoted in _items(text, option):
        found = _RANGE.fullmatch(item)
        if quoted or (found is None and names and item not in ("", "all")):
            classes.append(_label_of(item, names[:num_classes], option))
        elif found is None:
            known = "" if names else " (these weights do not name their classes)"
            raise UserError(
                f"{option}: expected numbers and ranges such as 1,3,5-9, names, or all{known}; got {text!r}"
            )
        else:
            classes += _range(item, int(found[1]), int(found[3] or found[1]), num_classes, option)
    return classes


def _items(text: str, option: str) -> Iterator[tuple[str, bool]]:
    """The items between commas, and whether each was in quotes."""
    place = 0
    while True:
        match = _ITEM.match(text, place)
        if match is None or (match["quoted"] is None and match["plain"].lstrip().startswith('"')):
            raise UserError(
                f"{option}: the quotes in {text!r} do not fit; a name in quotes ends with one before the comma, and a "
                'quote within it is doubled: "6"" pipe"'
            )
        if match["quoted"] is not None:
            yield match["quoted"].replace('""', '"'), True
        else:
            yield match["plain"].strip(), False
        place = match.end()
        if match["end"] == "":
            return


def _range(item: str, first: int, last: int, num_classes: int, option: str) -> range:
    if last < first:
        raise UserError(f"{option}: the range {item} ends before it begins; write {last}-{first}")
    if last >= num_classes:
        raise UserError(f"{option}: {item} goes beyond the model's classes 0..{num_classes - 1}")
    return range(first, last + 1)


def labels_of(items: Sequence[int | str], names: Sequence[str]) -> list[int]:
    """Labels for classes given by number or by name. Raises UserError as `parse_classes` does for names."""
    return [_label_of(item, names, "labels") if isinstance(item, str) else item for item in items]


def _label_of(name: str, names: Sequence[str], what: str) -> int:
    if not any(names):
        raise UserError(f"{what}: {name!r}: these weights do not name their classes; give numbers")
    plain = _folded(name)
    found = [label for label, other in enumerate(names) if other == name]
    found = found or [label for label, other in enumerate(names) if _folded(other) == plain != ""]
    if len(found) == 1:
        return found[0]
    if found:
        numbers = ", ".join(map(str, found))
        raise UserError(f"{what}: {len(found)} classes are named {name!r}; give one by its number: {numbers}")
    raise UserError(f"{what}: no class is named {name!r}; {_nearest(plain, names)}")


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _nearest(plain: str, names: Sequence[str]) -> str:
    """The names that are most like it, as they are to be written, with their numbers."""
    by_fold = {_folded(name): label for label, name in reversed(list(enumerate(names))) if name}
    within = [other for other in by_fold if plain and plain in other]
    near = list(dict.fromkeys([*within, *difflib.get_close_matches(plain, by_fold, n=_NEAREST, cutoff=0.4)]))
    chosen = (near or sorted(by_fold, key=by_fold.__getitem__))[:_NEAREST]
    shown = [f"{written_name(names[by_fold[other]])} ({by_fold[other]})" for other in chosen]
    return f"{'the nearest are' if near else 'the names begin with'} {', '.join(shown)}"


def written_name(name: str) -> str:
    """The name as `parse_classes` reads it."""
    plain = name == name.strip() and name != "all" and "," not in name and not name.startswith('"')
    if plain and _RANGE.fullmatch(name) is None:
        return name
    return '"' + name.replace('"', '""') + '"'
