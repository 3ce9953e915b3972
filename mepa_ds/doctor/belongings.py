"""The user's runs, shard sets, weights and cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mepa_ds.data.remote.remote_file import REMOTE_NAME
from mepa_ds.data.shards.index import ShardIndex
from mepa_ds.data.shards.writer import MANIFEST_NAME
from mepa_ds.doctor.finding import Finding, note, ok, problem
from mepa_ds.errors import UserError
from mepa_ds.evaluation import classifier
from mepa_ds.models import transformer_files
from mepa_ds.runtime.run_lock import is_held
from mepa_ds.runtime.status import STATUS_NAME, read_status
from mepa_ds.slurm import scheduler
from mepa_ds.slurm.checks import check_partition
from mepa_ds.slurm.profile import read_profile
from mepa_ds.teachers import conv_net, patch_pca
from mepa_ds.teachers.beside_weights import teachers_beside
from mepa_ds.teachers.known_vits import MODEL_TYPES, nearest_teachers
from mepa_ds.teachers.transformers_layout import WANTED_NAMES, facts_of_weights, layout_of
from mepa_ds.tokenizer import tokenizer_files
from mepa_ds.weights.directories import read_kind
from mepa_ds.weights.state_dict_files import (
    CONFIG_NAME,
    INDEX_NAME,
    PICKLE_NAME,
    WEIGHTS_NAME,
    read_json,
    read_state_dict,
    read_with_rest,
)
from mepa_ds.weights.state_dicts import Wanted
from mepa_ds.weights.var_sizes import GivenSizes

_MOST_RUNS = 200
_OURS = (transformer_files.KIND, tokenizer_files.KIND, patch_pca.KIND, classifier.KIND, *conv_net.KINDS)
_THEIRS = "weights in the transformers library's layout"


def look_at_runs(folder: Path) -> Iterator[Finding]:
    """Yields the runs below `folder` that are at work, were killed, or have failed."""
    places = sorted(folder.glob(f"**/{STATUS_NAME}"))[:_MOST_RUNS] if folder.is_dir() else []
    states: dict[str, int] = {}
    for path in places:
        run, told = path.parent, read_status(path.parent)
        state = str(told.get("state", "unknown"))
        if is_held(run):
            yield ok("run", f"{run}: is at work")
        elif state == "running":
            text = f"{run}: was killed at step {told.get('step')}; nobody holds its lock"
            yield note("run", text, "start it again: it goes on from its last checkpoint")
        elif state in ("failed", "diverged"):
            error = " ".join(str(told.get("error", "")).split())[:200]
            yield note("run", f"{run}: {state}: {error}", "docs/troubleshooting.md explains the message")
        else:
            states[state] = states.get(state, 0) + 1
    counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    yield ok("runs", f"{folder}: {counts or 'none that is finished'}")


def look_at_set(directory: Path) -> Finding:
    """Looks whether a shard set is there as a whole: names and sizes; `mepa data verify` reads everything."""
    about = str(directory)
    if (directory / MANIFEST_NAME).exists():
        remedy = "run the command that writes it again; it goes on (mepa data merge says what is missing)"
        return problem(about, "the shard set is not finished", remedy)
    try:
        index = ShardIndex.read(directory, "--data")
    except UserError as error:
        return problem(about, str(error), "give a directory of `mepa data build` or `mepa data precompute`")
    missing, torn = [], []
    for entry in index.shards:
        with suppress(OSError):
            if (directory / entry.name).stat().st_size != entry.bytes:
                torn.append(entry.name)
            continue
        missing.append(entry.name)
    if missing and not (directory / REMOTE_NAME).exists():
        return problem(about, f"{len(missing)} shards are missing, {missing[0]} among them", "make the set again")
    if torn:
        remedy = f"mepa data verify {directory}"
        return problem(about, f"{len(torn)} shards have another size than the index says, {torn[0]} among them", remedy)
    return ok(about, f"{index.num_samples} {index.kind} in {len(index.shards)} shards, {len(index.classes)} classes")


def look_at_weights(path: Path) -> Finding:
    """Looks whether weights can be read, and what they are of."""
    about = str(path)
    if not path.exists():
        return problem(about, "no such file or directory", "give a file of weights, or a directory like RUN/best")
    try:
        if path.is_dir() and (path / CONFIG_NAME).is_file():
            return _look_at_directory(path)
        layout, state = _layout_of(path) or (None, read_state_dict(path))
    except UserError as error:
        return problem(about, str(error), "give a whole file: .safetensors, or one of torch.save that holds tensors")
    count = sum(tensor.numel() for tensor in state.values())
    if layout is None:
        text = f"{len(state)} tensors, {count / 1e6:.1f}M numbers, in neither VAR's nor this project's layout"
        return note(about, text, "a teacher's file is read as it is: --weights of mepa data precompute features")
    return ok(about, f"{layout}, {count / 1e6:.1f}M numbers")


def _look_at_directory(path: Path) -> Finding:
    """Of weights with a config.json."""
    about, kind = str(path), read_kind(path)
    if not (path / PICKLE_NAME).is_file() and (damage := _damage(path)) is not None:
        return problem(about, damage, "copy or export the weights again")
    if kind in _OURS:
        return ok(about, f"a {kind} of this project")
    if kind == "None":
        return ok(about, "weights in Hugging Face's layout")
    if kind not in MODEL_TYPES:
        remedy = "of the transformers library's models, only teachers are read: DINOv2 and DINOv3"
        return note(about, f"a {kind[:100]}, which is none of this project's models", remedy)
    teachers, wrong = teachers_beside(path)
    if teachers:
        return ok(about, f"{_THEIRS} of the teacher {' or '.join(teachers)}")
    return note(about, f"{_THEIRS}, but of no teacher: {wrong}", "docs/data.md lists the teachers")


def _damage(directory: Path) -> str | None:
    """What is wrong with the safetensors of a directory; their headers tell whether the files are whole."""
    index = read_json(directory / INDEX_NAME).get("weight_map", {}) if (directory / INDEX_NAME).is_file() else None
    for name in [WEIGHTS_NAME] if index is None else sorted(set(index.values())):
        if not (directory / name).is_file():
            return f"{name} is missing"
        try:
            with safe_open(directory / name, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{name} is cut short or damaged ({error})"
    return None


def _layout_of(path: Path) -> tuple[str, Mapping[str, Tensor]] | None:
    """What the weights in a file are of, by their names and shapes, and they themselves; None: nothing known here."""
    from mepa_ds.models.var_checkpoint import convert_var as transformer
    from mepa_ds.tokenizer.tokenizer_files import convert_var as tokenizer

    with suppress(UserError):
        config, state = transformer(path, GivenSizes())
        return f"VAR's transformer of depth {config.depth}", state
    with suppress(UserError):
        stored = tokenizer(path, None, None)
        return f"VAR's tokenizer of {stored.config.codebook_size} codes", stored.state
    with suppress(UserError):
        state, _ = read_with_rest(path, Wanted("a teacher", WANTED_NAMES[0], WANTED_NAMES[1:]))
        teachers, wrong = nearest_teachers(facts_of_weights(state, layout_of(state, str(path)), str(path)))
        if teachers and not wrong:
            return f"{_THEIRS} of the teacher {' or '.join(teachers)}", state
    return None


def look_at_cluster(name: str | None) -> Iterator[Finding]:
    """Yields whether SLURM's commands are here, and whether a cluster's profile fits it."""
    here = scheduler.is_here()
    if name is None:
        yield ok("slurm", "its commands are here; --cluster NAME looks at a profile" if here else "not on this machine")
        return
    try:
        profile = read_profile(name)
        profile.number("GPUS_PER_NODE", 8)
    except UserError as error:
        yield problem("cluster", str(error), "mend the profile; docs/slurm.md explains its keys")
        return
    if not here:
        text = f"{profile.path}: can be read; its partition cannot be looked up, since SLURM is not on this machine"
        yield note("cluster", text, "run this on a login node of the cluster")
        return
    try:
        check_partition(profile, profile.get("PARTITION"))
    except UserError as error:
        yield problem("cluster", str(error), "mend MEPA_PARTITION, or ask the cluster's people")
    else:
        yield ok("cluster", f"{profile.path}: partition {profile.get('PARTITION')} is there")
