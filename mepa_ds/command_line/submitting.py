"""Options of commands that train several runs here, or hand them to SLURM as one array."""

from __future__ import annotations

from dataclasses import dataclass, fields

from mepa_ds.errors import UserError


@dataclass(kw_only=True)
class SubmitOptions:
    """What is asked of SLURM. A command says by a docstring of its own for `slurm` what comes after the jobs."""

    slurm: str | None = None
    """Submit to this cluster instead (a profile in slurm/clusters/), as one array."""
    nodes: int = 1
    """With --slurm: nodes of each run."""
    time: str | None = None
    """With --slurm: limit of one start, such as 12:00:00."""
    limit: int = 8
    """With --slurm: runs at a time."""

    def refuse_without_slurm(self, *more: str, hint: str = "") -> None:
        """Raises UserError for an option that only --slurm has a use for; `more`: names of further ones."""
        if self.slurm is not None:
            return
        for field in fields(self):
            if field.name in ("nodes", "time", "limit", *more) and getattr(self, field.name) != field.default:
                raise UserError(f"--{field.name.replace('_', '-')} belongs to --slurm{hint}")
