"""fits.json: where it is, and the laws in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mepa_ds.errors import UserError
from mepa_ds.files import sha256_of_file
from mepa_ds.scaling.laws import FITS
from mepa_ds.scaling.study.config import StudyConfig
from mepa_ds.scaling.study.plan import STUDY_NAME, read_study

REPORT_NAME, FITS_NAME = "report", "fits.json"


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


def read_document(path: Path) -> dict[str, Any]:
    """Reads a fits.json. Raises UserError for another file."""
    try:
        document = json.loads(path.read_text())
        laws = document["laws"]
    except (OSError, ValueError, KeyError, TypeError):
        laws = None
    if not isinstance(laws, dict):
        raise UserError(f"{path}: no fits are there; give the fits.json that mepa scale fit or report has written")
    return document


def stale(document: Mapping[str, Any]) -> Iterator[str]:
    """Yields a sentence if the table has changed since it was fitted."""
    path = Path(document["table"])
    if path.is_file() and sha256_of_file(path) != document["table_sha256"]:
        yield f"{path} has changed since these laws were fitted to it: fit them again."


def law_of(document: Mapping[str, Any], name: str) -> Any:
    """Returns a law of the document; None where it has none."""
    if name not in document["laws"]:
        return None
    data = document["laws"][name]
    if data.get("law") not in FITS:
        raise UserError(f"the law {data.get('law')!r} of {FITS_NAME} is unknown; there are {', '.join(FITS)}")
    return FITS[data["law"]].from_dict(data)
