"""Readers of datasets, one a file. To add one: a file like `digits.py`, and a line here."""

from __future__ import annotations

from data_tools.readers.digits import Digits
from data_tools.readers.imagefolder import ImageFolder

READERS = {
    "digits": Digits,
    "imagefolder": ImageFolder,
}
