"""What readers and tools leave out, counted by reason and named, so that nothing is left out silently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mepa_ds import log
from mepa_ds.safety.text import printable

_SHOWN = 5


def few(names: Sequence[str], most: int = _SHOWN) -> str:
    """The first of many names, for a message."""
    return ", ".join(printable(name) for name in names[:most]) + (", ..." if len(names) > most else "")


@dataclass
class LeftOut:
    """Counts what is left out, by reason, and keeps the first names. Its size does not grow with their number."""

    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    """The first names that were left out for each reason."""

    def add(self, reason: str, name: str) -> None:
        self._add(reason, 1, [printable(name)])

    def update(self, other: LeftOut) -> None:
        """Adds the counts and names of another instance."""
        for reason, count in other.counts.items():
            self._add(reason, count, other.names[reason])

    def _add(self, reason: str, count: int, names: Sequence[str]) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count
        known = self.names.setdefault(reason, [])
        known += names[: _SHOWN - len(known)]

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        reasons = [
            f"{count} {reason} ({', '.join(self.names[reason])}{', ...' if count > len(self.names[reason]) else ''})"
            for reason, count in self.counts.items()
        ]
        return f"left out: {'; '.join(reasons)}"

    def note(self, where: object) -> None:
        """Prints what was left out of `where`, if anything was."""
        if self:
            log.say(f"{where}: {self}")

    def to_json(self) -> dict[str, tuple[int, tuple[str, ...]]]:
        return {reason: (count, tuple(self.names[reason])) for reason, count in self.counts.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, tuple[int, Sequence[str]]]) -> LeftOut:
        """What an offset index said, as it may be shown."""
        found = cls()
        for reason, (count, names) in data.items():
            found._add(printable(reason), count, [printable(name) for name in names[:_SHOWN]])
        return found
