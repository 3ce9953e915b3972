"""Readers of datasets, one a file. To add one: a file like `digits.py`, and a line here."""

from __future__ import annotations

from mepa_ds.data_tools.readers.digits import Digits
from mepa_ds.data_tools.readers.idx import Idx
from mepa_ds.data_tools.readers.imagefolder import ImageFolder
from mepa_ds.data_tools.readers.imagenet import ImageNet
from mepa_ds.data_tools.readers.parquet import Parquet
from mepa_ds.data_tools.readers.webdataset import WebDataset

READERS = {
    "digits": Digits,
    "idx": Idx,
    "imagefolder": ImageFolder,
    "imagenet": ImageNet,
    "parquet": Parquet,
    "webdataset": WebDataset,
}
