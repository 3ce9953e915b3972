"""Modules under the names that they had before version 0.2: programs that import them go on, with a DeprecationWarning.

To be deleted with version 0.3. Where a folder has an old module's name today (`images`, `weights`) there is no way from
the old name to the new one: CHANGELOG.md has the whole table. What left its module is found where it was, too
(mepa_ds.moved.names).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

from mepa_ds.moved.names import NAMES, moved_name

_PACKAGE = "mepa_ds."
_GONE = "loops"
"""A folder that is no more: an empty package now."""

_FOLDERS = {
    "checkpoint": "engine.background_writer",
    "cli.results": "cli.evaluate cli.report",
    "command_line": "cli.entry cli.paths cli.recipes",
    "data.remote": "data.fetched_ahead data.fetching data.openers data.shard_cache data.shared_lock urls",
    "data.shards": "data.index data.left_out data.open_files data.samples data.tar data.tar_headers data.writer",
    "engine.starting": "engine.initial_weights engine.lean_start",
    "evaluation.tokenizer": "evaluation.reconstruction",
    "generation": "loops.sampling loops.sample_grids",
    "objective": "loops.flops loops.reports",
    "planning": "loops.plan loops.memory_trace loops.frozen_networks",
    "pretrain": "loops.inputs loops.online",
    "pretrain.recording": "loops.window",
    "reports": "loops.run_report",
    "runtime": "loops.failures loops.output loops.recorder loops.run_lock loops.schedule loops.stopping loops.trackers "
    "lost_peers metrics",
    "slurm.in_job": "slurm.cause slurm.parts slurm.recipe_value slurm.samples",
    "config": "paths",
    "teachers": "pca",
    "weights": "state_dicts state_dict_files var_settings",
}
"""Modules that kept their own name: today's folder, and what they were called."""

_RENAMED = {
    "cli.scales_option": "command_line.scales",
    "cpus": "machine",
    "memory": "machine",
    "data.in_step": "data.lockstep",
    "data.sample_table": "data.shards.offset_index",
    "engine.checkpoint_files": "checkpoint.files",
    "engine.fragment_store": "checkpoint.store",
    "image_decoding": "images.decoding",
    "image_files": "images.sets",
    "loops.evaluation": "pretrain.evaluation.evaluations",
    "loops.guards": "pretrain.recording.detectors",
    "loops.pretraining": "pretrain.run",
    "loops.saving": "pretrain.checkpointing",
    "loops.image_scores": "evaluation.inception",
    "loops.score_formulas": "evaluation.formulas",
    "loops.start_record": "pretrain.start",
    "loops.step_records": "pretrain.recording.metrics",
    "loops.tokenizer_training": "train_tokenizer.loop",
    "loops.training_data": "pretrain.data",
    **{f"loops.tokenizer_{name}": f"train_tokenizer.{name}" for name in ("adversary", "checkpoint", "evaluation")},
    **{f"loops.tokenizer_{name}": f"train_tokenizer.{name}" for name in ("reduce", "revival", "trainer")},
    "objective.pretraining": "objective.objective",
    "pretrained": "generation.model_files",
    "slurm.stage": "slurm.in_job.node_copies",
}
NEW_NAMES = _RENAMED | {
    old: f"{folder}.{old.rpartition('.')[2]}" for folder, names in _FOLDERS.items() for old in names.split()
}
"""Old module -> today's, without the package's own name."""


class _Alias(Loader):
    """Gives today's module under its old name: the same object, so that what is set in one is set in both."""

    def __init__(self, new: str):
        self._new = new

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self._module = importlib.import_module(self._new)
        if (own := self._new.removeprefix(_PACKAGE)) in NAMES:
            self._module.__getattr__ = partial(moved_name, own)  # type: ignore[method-assign]
        self._spec = self._module.__spec__
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec

    def get_code(self, name: str) -> CodeType | None:
        """For `python -m`."""
        spec = importlib.util.find_spec(self._new)
        code: CodeType | None = spec.loader.get_code(self._new) if spec and spec.loader else None  # type: ignore[attr-defined]
        return code


class _OldNames(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(_PACKAGE):
            return None
        old = fullname.removeprefix(_PACKAGE)
        if old == _GONE:
            return ModuleSpec(fullname, None, is_package=True)
        if (new := NEW_NAMES.get(old)) is None:
            return None
        warnings.warn(f"{fullname} is {_PACKAGE}{new} now", DeprecationWarning, stacklevel=2)
        return ModuleSpec(fullname, _Alias(_PACKAGE + new))


def install() -> None:
    """Asked last, when no module of that name is found."""
    if not any(isinstance(finder, _OldNames) for finder in sys.meta_path):
        sys.meta_path.append(_OldNames())
