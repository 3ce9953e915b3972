#!/bin/bash
# slurm/submit.sh RECIPE [--cluster NAME] [--nodes N] [--after JOB] [--dry-run] [-- key=value ...]: `mepa slurm submit`.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[[ -x $python ]] || python=python3
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m mepa_ds slurm submit "$@"
