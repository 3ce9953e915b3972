"""SLURM's commands as stand-ins that answer from files, for tests of `mepa slurm` without a cluster."""

from __future__ import annotations

import stat
from pathlib import Path

_SCONTROL = """#!/bin/bash
case "$4 $5" in
"partition "*) echo "PartitionName=gpu Nodes=n1" ;;
"node "*) echo "NodeName=n1 Gres=$GRES AvailableFeatures=fast" ;;
*) if [[ -r $FAKE/job-$5 ]]; then cat "$FAKE/job-$5"; else echo "$NO_JOB" >&2; exit 1; fi ;;
esac
"""
_SBATCH = """#!/bin/bash
[[ $1 == --test-only ]] && exit
if [[ -n ${LIMIT:-} && -e $FAKE/submitted ]]; then
    echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2
    exit 1
fi
echo "$*" >>"$FAKE/submitted"
wc -l <"$FAKE/submitted"
"""
_SCANCEL = """#!/bin/bash
echo "$*" >"$FAKE/cancelled"
"""


def write(folder: Path) -> dict[str, str]:
    """Puts them into `folder`/bin; returns variables that they read, beside PATH. `GRES`: the GPUs of the only node."""
    for name, text in (("scontrol", _SCONTROL), ("sbatch", _SBATCH), ("scancel", _SCANCEL)):
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {"FAKE": str(folder), "GRES": "gpu:2", "NO_JOB": "slurm_load_jobs error: Invalid job id specified"}
