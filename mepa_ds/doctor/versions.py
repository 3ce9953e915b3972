"""Versions of Python and of the packages, against what this package asks for."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

import mepa_ds
from mepa_ds.doctor.finding import Finding, note, ok, problem

_PACKAGE = "mepa_ds"
_SHOWN = ("torch", "torchvision", "deepspeed", "timm", "numpy")


def look_at_versions() -> Iterator[Finding]:
    """Yields Python's version, the main packages, and every requirement that is not met."""
    yield ok("python", platform.python_version())
    yield ok(_PACKAGE, mepa_ds.__version__)
    try:
        requirements = [Requirement(text) for text in metadata.requires(_PACKAGE) or []]
    except metadata.PackageNotFoundError:
        yield note(_PACKAGE, "is not installed, so versions are not compared", "run: pip install -e .")
        return
    for requirement in requirements:
        extra = _extra_of(requirement)
        found = _version_of(requirement.name)
        if requirement.name == _PACKAGE or (extra and found is None) or extra in ("dev", "mutants"):
            continue
        if found is None:
            yield problem(requirement.name, "is not installed", f"run: pip install '{_asked(requirement)}'")
        elif not requirement.specifier.contains(found, prereleases=True):
            text = f"{found}, but {_PACKAGE} needs {requirement.specifier}"
            yield problem(requirement.name, text, f"run: pip install '{_asked(requirement)}'")
        elif requirement.name in _SHOWN:
            yield ok(requirement.name, found)
    torch, vision = _version_of("torch"), _version_of("torchvision")
    if torch and vision and Version(torch).minor - Version(vision).minor != _MINORS_BETWEEN:
        text = f"torch {torch} and torchvision {vision} may not belong together"
        yield note("torchvision", text, "install both by one command: pip install --upgrade torch torchvision")


_MINORS_BETWEEN = -15  # torch 2.N comes with torchvision 0.(N + 15)


def _extra_of(requirement: Requirement) -> str:
    """Returns the extra that asks for it; empty: the package itself does."""
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        return ""
    return str(requirement.marker).rpartition("==")[2].strip(" '\"")


def _asked(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"


def _version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
