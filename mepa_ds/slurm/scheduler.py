"""Questions to SLURM, answered by its own commands."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from mepa_ds.errors import UserError

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"}
ENDED |= {"PREEMPTED", "REVOKED"}
_FIELD = re.compile(r"([A-Z][\w/:]*)=(\S*)")
_GPU = re.compile(r"gpu:(?:(?P<type>[^:,()]+):)?(?P<count>\d+)")


@dataclass(frozen=True)
class Node:
    """A node of the cluster: its GPUs and features."""

    name: str
    gpus: tuple[tuple[str, int], ...]
    """(type, count) of each kind; a type may be empty."""
    features: tuple[str, ...]


def slurm(command: Sequence[str]) -> str:
    """Runs one of SLURM's commands; raises UserError with its own words if it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found; run this on a login node of a SLURM cluster") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: SLURM did not answer within 60 s; try again (scontrol ping)") from None
    if result.returncode:
        raise UserError(f"{command[0]}: {_last_line(result.stderr)}")
    return result.stdout


def _last_line(text: str) -> str:
    lines = [line.split("error: ", 1)[-1] for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "failed without a message"


def is_here() -> bool:
    """Whether SLURM's commands are on this machine, and know a cluster. A cluster that is down is there, too."""
    if not all(shutil.which(command) for command in ("scontrol", "sbatch")):
        return False
    try:
        partitions()
    except UserError as error:
        return "configuration source" not in str(error)
    return True


def partitions() -> list[str]:
    return [fields["PartitionName"] for fields in _show("partition")]


def nodes_of(partition: str) -> list[Node]:
    """All nodes of a partition, whatever their state."""
    names = next(fields["Nodes"] for fields in _show("partition", partition))
    nodes = []
    for fields in _show("node", names):
        gpus = tuple((gpu["type"] or "", int(gpu["count"])) for gpu in _GPU.finditer(fields.get("Gres", "")))
        nodes.append(Node(fields["NodeName"], gpus, tuple(fields.get("AvailableFeatures", "").split(","))))
    return nodes


def jobs(job: str) -> list[dict[str, str]]:
    """`scontrol show job`: a mapping for each member of an array; [] once SLURM has forgotten the job.

    Raises UserError if SLURM does not answer.
    """
    try:
        return _show("job", job)
    except UserError as error:
        if "Invalid job id" in str(error):
            return []
        raise


def is_active(job: str) -> bool:
    """Whether any part of a job waits or runs."""
    return any(fields.get("JobState") not in ENDED for fields in jobs(job))


def _show(kind: str, name: str | None = None) -> list[dict[str, str]]:
    command = ["scontrol", "--oneliner", "--all", "show", kind, *([name] if name else [])]
    return [dict(_FIELD.findall(line)) for line in slurm(command).splitlines() if line.strip()]
