"""A cluster as one small file of shell assignments, slurm/clusters/NAME.env, read here and sourced by every job."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from mepa_ds import shipped
from mepa_ds.config.base import read_text
from mepa_ds.config.paths import given_path
from mepa_ds.errors import UserError

KEYS = frozenset(
    f"MEPA_{name}"
    for name in re.findall(
        r"\w+",
        "PARTITION CPU_PARTITION ACCOUNT QOS CONSTRAINT RESERVATION EXCLUDE GPUS_PER_NODE GPU_TYPE GPU_MEMORY_GB "
        "CPUS_PER_GPU MEM_PER_GPU_GB TIME ACCELERATOR SETUP CONTAINER PYTHON LAUNCHER CPU_BIND SHARED_PATHS SCRATCH "
        "STAGE EXPORT MIN_DISK_GB MIN_BANDWIDTH_GBS HEALTH SIGNAL_SECONDS STOP_SECONDS MAX_RESTARTS INTERFACE "
        "NODE_BANDWIDTH_GBS NETWORK_BANDWIDTH_GBS STORAGE_BANDWIDTH_GBS STORAGE_TOTAL_GBS",
    )
)
_ASSIGNMENT = re.compile(r"(?P<key>[A-Za-z_][A-Za-z0-9_]*)=(?P<value>.*)")


def root() -> Path:
    """Where jobs start, and relative paths of recipes and pipelines begin: the clone, or the working directory."""
    return shipped.CLONE or Path.cwd()


@dataclass(frozen=True)
class Profile:
    """A cluster's settings."""

    path: Path
    values: dict[str, str]

    def get(self, name: str, default: str = "") -> str:
        """The value of MEPA_<name>; `default` where it is absent or empty."""
        return self.values.get(f"MEPA_{name}") or default

    def number(self, name: str, default: int) -> int:
        """The value of MEPA_<name> as a number. Raises UserError unless it is a whole number above 0."""
        text = self.get(name, str(default))
        if not re.fullmatch("[1-9][0-9]*", text):  # bash reads 0100 as 64
            raise UserError(f"{self.path}: MEPA_{name}={text}: expected a whole number above 0")
        return int(text)

    def bandwidth(self, name: str) -> float | None:
        """The value of MEPA_<name>_GBS in bytes a second; None where it is absent or empty.

        Raises UserError unless it is a number above 0.
        """
        text = self.get(f"{name}_GBS")
        if not text:
            return None
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) or float(text) == 0:
            raise UserError(f"{self.path}: MEPA_{name}_GBS={text}: expected GB a second, a number above 0 such as 12.5")
        return float(text) * 1e9

    @property
    def gpus_per_node(self) -> int:
        return self.number("GPUS_PER_NODE", 8)


def read_profile(name: str | None) -> Profile:
    """The profile NAME of slurm/clusters (the working directory's or the shipped ones), or a file that ends in .env.

    Raises:
        UserError: it does not exist, has a line that is no assignment, or a MEPA_ key that means nothing.
    """
    clusters = Path("slurm/clusters")
    shipped_clusters = shipped.folder("slurm") / "clusters"
    known = sorted({path.stem for folder in (clusters, shipped_clusters) for path in folder.glob("*.env")})
    remedy = f"known clusters: {', '.join(known)}; copy {shipped_clusters}/h100.env to {clusters}/NAME.env to make one"
    if name is None:
        raise UserError(f"--cluster: name the cluster's profile (or set MEPA_CLUSTER); {remedy}")
    path = given_path(name, "--cluster") if name.endswith(".env") else shipped.find(clusters / f"{name}.env")
    path = path.resolve()
    if not path.is_file():
        raise UserError(f"--cluster {name}: no profile {path}; {remedy}")
    values = {}
    for number, line in enumerate(read_text(path, "the profile").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _ASSIGNMENT.fullmatch(line.strip())
        words = _words(found["value"]) if found else None
        if found is None or words is None:
            raise UserError(f"{path}:{number}: expected KEY=value with quotes around blanks, got {line!r}")
        if found["key"].startswith("MEPA_") and found["key"] not in KEYS:
            near = difflib.get_close_matches(found["key"], KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(sorted(KEYS))}"
            raise UserError(f"{path}:{number}: unknown key {found['key']}; {hint}")
        values[found["key"]] = words
    profile = Profile(path, values)
    if profile.get("LAUNCHER", "srun") not in ("srun", "torchrun"):
        raise UserError(f"{path}: MEPA_LAUNCHER={profile.get('LAUNCHER')}: expected srun or torchrun")
    if not profile.get("PARTITION"):
        raise UserError(f"{path}: MEPA_PARTITION is not set; `sinfo --summarize` lists the partitions")
    stop, before = profile.number("STOP_SECONDS", 240), profile.number("SIGNAL_SECONDS", 300)
    if stop >= before:
        raise UserError(
            f"{path}: MEPA_STOP_SECONDS={stop}: the time limit comes MEPA_SIGNAL_SECONDS={before} s after the signal, "
            "and a job that meets it is not requeued; give ranks less time to stop, or signal earlier"
        )
    return profile


def _words(text: str) -> str | None:
    """A shell word without its quotes, its $VARIABLES filled in; None if it is more than one."""
    try:
        words = shlex.split(text, comments=True)
    except ValueError:
        return None
    return None if len(words) > 1 else os.path.expandvars("".join(words))
