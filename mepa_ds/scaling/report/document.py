"""fits.json: where it is, and the laws in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mepa_ds.errors import UserError
from mepa_ds.files import sha256_of_file
from mepa_ds.scaling.fits import read_fit
from mepa_ds.scaling.study.config import StudyConfig
from mepa_ds.scaling.study.plan import STUDY_NAME, read_study

REPORT_NAME, FITS_NAME = "report", "fits.json"
_KEYS = {
    "N": "n", "N_active": "n", "D": "d", "C": "c", "E": "experts", "G": "granularity", "unique": "unique",
    "loss": "loss",
}  # fmt: skip
"""Which of a fit's columns an input of its law is."""


def find_document(path: Path) -> tuple[Path, StudyConfig | None]:
    """Returns the fits.json that `path` stands for, and the study that it is of; None if that is not known.

    `path` is a fits.json itself, a study file or the output_dir of a study. `mepa scale fit` writes its fits.json
    beside the table, `mepa scale report` in report/; of the two the newer one counts.

    Raises:
        UserError: there is none.
    """
    if path.is_file() and path.suffix == ".json":
        for folder in (path.parent, path.parent.parent):
            if (folder / STUDY_NAME).is_file():
                return path, read_study(folder)
        return path, None
    study = read_study(path)
    folder = study.output_dir
    found = [p for p in (folder / FITS_NAME, folder / REPORT_NAME / FITS_NAME) if p.is_file()]
    if not found:
        raise UserError(f"{folder}: no {FITS_NAME} there; run mepa scale report {folder} (or mepa scale fit) first")
    return max(found, key=lambda p: p.stat().st_mtime_ns), study


def stale(document: Mapping[str, Any]) -> Iterator[str]:
    """Yields a sentence if the table has changed since it was fitted."""
    path = Path(document["table"]["path"])
    if path.is_file() and sha256_of_file(path) != document["table"]["sha256"]:
        yield f"{path} has changed since these laws were fitted to it: fit them again."


def law_of(document: Mapping[str, Any], name: str) -> Any:
    """Returns the fit of a law of the document; None where it has none.

    Raises:
        UserError: the entry is damaged.
    """
    return read_fit(document["laws"][name]["fit"]) if name in document["laws"] else None


def input_columns(law: Any, columns: Mapping[str, str]) -> list[str]:
    """Returns the column of each input of a law, in its order. `columns`: those of the law's `TableFit`.

    A training set counted in images becomes tokens before the fit: `unique_tokens`.
    """
    found = []
    for name in law.input_names:
        key = columns.get("x", "n") if name == "x" else _KEYS[name]
        column = columns.get(key, key)
        found.append("unique_tokens" if column == "unique_images" else column)
    return found
