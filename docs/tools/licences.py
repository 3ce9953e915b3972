"""Writes docs/licences.md: the packages that an installation of everything has, with their licences (make licences)."""

from __future__ import annotations

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "licences.md"
LOCK = ROOT / "requirements.lock"
_MOST = 60
_HEAD = """# Licences

mepa_ds itself is under the MIT licence (`LICENSE`). It has no other project's code in it; what it uses is installed
beside it, and each package is under its own licence. These are the packages of `requirements.lock` on Linux, with the
development tools, as the packages themselves say it. The NVIDIA packages are NVIDIA's own binaries, which PyTorch's
packages for CUDA ask for. Written by `make licences`.

| package | licence |
|---|---|
"""


def locked() -> set[str]:
    """The names in requirements.lock, for any system and Python."""
    return {name.lower() for name in re.findall(r"^([\w.-]+)==", LOCK.read_text(), re.MULTILINE)}


def licence_of(found: Distribution) -> str:
    """By the licence expression, else the classifiers, else the first line of the licence."""
    about = found.metadata
    if expression := about.get("License-Expression"):
        return str(expression)
    classifiers = [line.rpartition("::")[2].strip() for line in about.get_all("Classifier") or [] if "License" in line]
    if named := [name for name in classifiers if name not in ("OSI Approved", "Other/Proprietary License")]:
        return ", ".join(named)
    lines = (about.get("License") or "").strip().splitlines()
    return lines[0][:_MOST] if lines else "not said; see the package"


def page() -> str:
    rows = []
    for name in sorted(locked()):
        try:
            rows.append(f"| {name} | {licence_of(distribution(name)).replace('|', '/')} |\n")
        except PackageNotFoundError:  # for another system or Python
            continue
    return _HEAD + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE.relative_to(ROOT))
