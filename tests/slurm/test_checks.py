"""`mepa slurm` without a cluster: SLURM's commands are stand-ins that answer from files."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml

from mepa_ds.cli.slurm import check_words, main
from mepa_ds.config.base import apply_overrides, dump_yaml, load_config
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.remote.remote_file import RemoteShards
from mepa_ds.errors import UserError
from mepa_ds.slurm import scheduler
from mepa_ds.slurm.checks import check_plan
from mepa_ds.slurm.in_job.node_copies import copy_set, sets_to_copy
from mepa_ds.slurm.profile import Profile, read_profile
from mepa_ds.slurm.status import last_error, status
from tests import tiny_run
from tests.slurm import stand_ins
from tests.train_tokenizer import training_run as tokenizer_run

PROFILE = "MEPA_PARTITION=gpu\nMEPA_GPUS_PER_NODE=2\nMEPA_ACCELERATOR=cpu\n"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with fake commands, a profile, and the data of a tiny run."""
    for name, value in stand_ins.write(tmp_path).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "fake.env").write_text(PROFILE)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    tiny_run.make_run(tmp_path)
    return tmp_path


def mepa(cluster: Path, command: str | Path, *words: str | Path) -> None:
    main([str(command), "--cluster", str(cluster / "fake.env"), *map(str, words)])


def refused(cluster: Path, *words: str | Path) -> str:
    with pytest.raises(UserError) as error:
        mepa(cluster, *words)
    assert not (cluster / "submitted").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gpu:8", [("", 8)]),
        ("gpu:a100:4(S:0-1)", [("a100", 4)]),
        ("gpu:3090:8", [("3090", 8)]),
        ("gpu:2080ti:4", [("2080ti", 4)]),
        ("gpu:h100-80gb:8(S:0-1)", [("h100-80gb", 8)]),
        ("gpu:a100_1g.5gb:7", [("a100_1g.5gb", 7)]),
        ("gpu:a100:2(S:0),gpu:h100:6(S:1)", [("a100", 2), ("h100", 6)]),
        ("(null)", []),
    ],
)
def test_gpus_of_a_node(monkeypatch: pytest.MonkeyPatch, cluster: Path, gres: str, gpus: list[tuple[str, int]]) -> None:
    monkeypatch.setenv("GRES", gres)
    (node,) = scheduler.nodes_of("gpu")
    assert list(node.gpus) == gpus


def test_a_forgotten_job_is_not_a_silent_slurm(monkeypatch: pytest.MonkeyPatch, cluster: Path) -> None:
    assert not scheduler.is_active("9")
    monkeypatch.setenv("NO_JOB", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    with pytest.raises(UserError, match="Unable to contact"):
        scheduler.is_active("9")


def test_variables_of_a_profile_are_filled_in(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "ada")
    (cluster / "fake.env").write_text(PROFILE + 'MEPA_SHARED_PATHS="/home/$USER /data"\n')
    assert read_profile(str(cluster / "fake.env")).get("SHARED_PATHS") == "/home/ada /data"


def test_the_plan_is_the_clusters(cluster: Path) -> None:
    """An fp32 recipe for GPUs, planned on a machine without any: its memory is not compared with the login node's."""
    config = load_config(PretrainConfig, cluster / "recipe.yaml")
    values = {"MEPA_ACCELERATOR": "cuda"}
    path = cluster / "fake.env"
    text = check_plan(Profile(path, values), cluster / "recipe.yaml", config, 2)
    assert "2 ranks, each with a GPU" in text
    assert f"fits: unknown; set MEPA_GPU_MEMORY_GB in {path}" in text
    assert "each with a CPU" in check_plan(Profile(path, {"MEPA_ACCELERATOR": "cpu"}), path, config, 2)
    wide = load_config(PretrainConfig, cluster / "recipe.yaml", ["model.width=2048"])
    with pytest.raises(
        UserError, match=r"does not fit: a rank needs .* GB of host memory, but has 1 GB \(MEPA_MEM_PER"
    ):
        check_plan(Profile(path, values | {"MEPA_MEM_PER_GPU_GB": "1"}), path, wide, 2)


def test_the_memory_of_cpu_ranks_is_compared_with_what_a_job_asks_for(cluster: Path) -> None:
    """Weights, gradients, moments and activations of a rank without a GPU are all host memory."""
    wide = ["--", "model.width=2048"]
    (cluster / "fake.env").write_text(PROFILE + "MEPA_MEM_PER_GPU_GB=4\n")
    said = refused(cluster, "submit", cluster / "recipe.yaml", *wide)
    found = re.search(
        r"does not fit: a rank needs ([\d.]+) GB of host memory, but has 4 GB \(MEPA_MEM_PER_GPU_GB", said
    )
    assert found is not None, said
    assert 4 < float(found[1]) < 20
    (cluster / "fake.env").write_text(PROFILE + f"MEPA_MEM_PER_GPU_GB={int(float(found[1])) + 1}\n")
    mepa(cluster, "submit", cluster / "recipe.yaml", "--dry-run", *wide)


def test_a_recipe_is_the_callers_and_jobs_to_wait_for_are_named(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """RECIPE is relative to where the command is typed."""
    mepa(cluster, "submit", "recipe.yaml", "--after", "4711", "--after", "4712", "--stage", "--dry-run")
    line = capsys.readouterr().out.splitlines()[-1]
    assert "--dependency=afterok:4711:4712" in line
    assert "MEPA_STAGE=on" in line
    assert f"pretrain.sbatch {cluster}/recipe.yaml" in line


def study(cluster: Path, *runs: str) -> None:
    (cluster / "study.txt").write_text("".join(f"{cluster}/recipe.yaml output_dir={cluster}/{run}\n" for run in runs))


def finished(cluster: Path, run: str) -> None:
    """What a run leaves that is done."""
    config = load_config(PretrainConfig, cluster / "recipe.yaml", [f"output_dir={cluster}/{run}"])
    (cluster / run / "slurm").mkdir(parents=True)
    (cluster / run / "slurm/result").write_text("done\n")
    (cluster / run / "resolved.yaml").write_text(dump_yaml(config))


def test_runs_of_a_study_are_known_by_where_they_write(cluster: Path) -> None:
    """A line before those that are done: only its run is started."""
    study(cluster, "a", "b")
    for run in "ab":
        finished(cluster, run)
    study(cluster, "new", "a", "b")
    mepa(cluster, "submit", cluster / "study.txt", "--job", "scaling-study")
    array, check = (cluster / "submitted").read_text().splitlines()
    assert "--array=0%8" in array
    assert "--dependency=afterany:1" in check
    assert (cluster / "study.slurm/part-2/result").read_text() == "done\n"
    # Its members read the lines that were submitted, whatever becomes of the user's file.
    assert array.endswith(f"{cluster}/study.slurm/manifest.txt")
    assert (cluster / "study.slurm/manifest.txt").read_text() == (cluster / "study.txt").read_text()


def test_a_run_that_was_done_before_a_key_was_new_is_done(cluster: Path) -> None:
    study(cluster, "a", "new")
    finished(cluster, "a")
    values = yaml.safe_load((cluster / "a/resolved.yaml").read_text())
    del values["branch_from"], values["optim"]["cooldown"], values["log"]["keep_steps"]
    (cluster / "a/resolved.yaml").write_text(yaml.safe_dump(values))
    mepa(cluster, "submit", cluster / "study.txt", "--job", "scaling-study")
    assert "--array=1%8" in (cluster / "submitted").read_text()


def test_a_run_of_a_study_that_is_to_be_longer_is_not_done(cluster: Path) -> None:
    study(cluster, "a", "b")
    for run in "ab":
        finished(cluster, run)
    text = (cluster / "study.txt").read_text().splitlines()
    (cluster / "study.txt").write_text(f"{text[0]}\n{text[1]} train.steps=400 data.tokens={cluster}/train.tokens\n")
    mepa(cluster, "submit", cluster / "study.txt", "--job", "scaling-study")
    assert "--array=1%8" in (cluster / "submitted").read_text()


def test_jobs_that_belong_together_are_submitted_all_or_none(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--test-only does not see every limit."""
    study(cluster, "a")
    monkeypatch.setenv("LIMIT", "1")
    with pytest.raises(UserError, match="QOSMaxSubmitJobPerUserLimit; jobs 1, submitted before, were cancelled"):
        mepa(cluster, "submit", cluster / "study.txt", "--job", "scaling-study")
    assert (cluster / "cancelled").read_text() == "1\n"
    (cluster / "submitted").unlink()
    shards = {"commands": [f"imagefolder --root {cluster} --out {cluster}/images"]}
    with pytest.raises(UserError, match="jobs 1, submitted before, were cancelled"):
        mepa(cluster, "pipeline", pipeline(cluster, shards=shards))


def test_both_partitions_must_exist(cluster: Path) -> None:
    (cluster / "fake.env").write_text(PROFILE + "MEPA_CPU_PARTITION=cpu\n")
    message = refused(cluster, "submit", cluster / "recipe.yaml")
    assert "there is no partition 'cpu' on this cluster; its partitions: gpu" in message


def test_the_clone_must_be_in_sight(cluster: Path) -> None:
    (cluster / "fake.env").write_text(PROFILE + f"MEPA_SHARED_PATHS={cluster}\n")
    assert "this clone: " in refused(cluster, "submit", cluster / "recipe.yaml")


@pytest.mark.parametrize(("constraint", "fits"), [("fast", True), ("slow", False), ("fast&ib", True), ("a|b", True)])
def test_only_a_plain_constraint_is_judged_here(cluster: Path, constraint: str, fits: bool) -> None:
    (cluster / "fake.env").write_text(PROFILE + f"MEPA_CONSTRAINT='{constraint}'\n")
    if fits:
        mepa(cluster, "submit", cluster / "recipe.yaml")
    else:
        assert "only 0 nodes" in refused(cluster, "submit", cluster / "recipe.yaml")


def test_a_node_of_two_kinds(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRES", "gpu:a100:2(S:0),gpu:h100:6(S:1)")
    assert "mixes 2 a100 + 6 h100 a node; choose one of them" in refused(cluster, "submit", cluster / "recipe.yaml")
    (cluster / "fake.env").write_text(PROFILE.replace("=2", "=4") + "MEPA_GPU_TYPE=h100\n")
    mepa(cluster, "submit", cluster / "recipe.yaml", "--dry-run")
    (cluster / "fake.env").write_text(PROFILE.replace("=2", "=4") + "MEPA_GPU_TYPE=a100\n")
    assert "only 0 nodes with 4 a100" in refused(cluster, "submit", cluster / "recipe.yaml")


def test_a_stop_must_end_before_the_time_limit(cluster: Path) -> None:
    (cluster / "fake.env").write_text(PROFILE + "MEPA_STOP_SECONDS=300\n")
    assert "MEPA_STOP_SECONDS=300: the time limit comes" in refused(cluster, "submit", cluster / "recipe.yaml")


def test_runs_of_a_study_write_apart(cluster: Path) -> None:
    study(cluster, "a", "b", "a")
    message = refused(cluster, "submit", cluster / "study.txt", "--job", "scaling-study")
    assert f"run 3: output_dir: {cluster}/a is also used by run 1; give each its own" in message


def pipeline(cluster: Path, **stages: object) -> Path:
    path = cluster / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"pretrain": {"recipe": str(cluster / "recipe.yaml")}, **stages}))
    return path


def test_changed_work_of_a_pipeline_is_not_done(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [f"imagefolder --root {cluster} --out {cluster}/images"]

    def states(parts: int, more: str = "") -> set[Path]:
        shards = {"commands": [commands[0] + more], "parts": parts}
        mepa(cluster, "pipeline", pipeline(cluster, shards=shards), "--dry-run")
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("shards: ")]
        return {Path(line.split("build_shards.sbatch ")[1].split()[0]) for line in lines}

    (first,) = states(2)
    for part in range(2):
        (first / f"part-{part}").mkdir(parents=True)
        (first / f"part-{part}/result").write_text("done\n")
    assert states(2) == set()
    assert len(states(4) | states(2, " --image-side 8") | {first}) == 3


def test_a_pipeline_lacks_nothing_that_no_stage_makes(cluster: Path) -> None:
    recipe = cluster / "recipe.yaml"
    values = yaml.safe_load(recipe.read_text())
    images = f"imagefolder --root {cluster} --out {cluster}/images"
    tokens = f"tokens {cluster}/images --tokenizer {cluster}/nowhere"

    def message(*overrides: str, **stages: object) -> str:
        recipe.write_text(yaml.safe_dump(apply_overrides(values, overrides)))
        return refused(cluster, "pipeline", pipeline(cluster, **stages))

    shards = {"commands": [images]}
    assert "tokenizer: nowhere: no such file" in message("tokenizer=nowhere", shards=shards)
    assert f"--tokenizer: {cluster}/nowhere: no such file" in message(shards=shards, precompute={"commands": [tokens]})
    assert f"images: {cluster}/images: no such file" in message(precompute={"commands": [tokens]})
    assert "--root: /nowhere: no such file" in message(shards={"commands": ["imagefolder --root /nowhere --out x"]})
    best = message("data.heldout_tokens=null", samples={"weights": "best"})
    assert "samples.weights: best means the weights of lowest held-out cross-entropy, but the recipe has no" in best


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            {"shards": {"commands": ["imagent --tar x --out y"]}},
            "imagent --tar x --out y: build_shards does not accept",
        ),
        (
            {"shards": {"commands": ["imagefolder --root x --out y --imge-side 8"]}},
            "build_shards does not accept this command",
        ),
        (
            {"precompute": {"commands": ["tokens x --tokeniser y"]}},
            "tokens x --tokeniser y: precompute does not accept",
        ),
        ({"teacher": {"commands": ["fit-teacher"]}}, "fit-teacher: precompute does not accept this"),
        ({"samples": {"options": "--cfg 1.5 --nosuch 3"}}, "--cfg 1.5 --nosuch 3: sample does not accept this"),
        ({"samples": {"parts": 99}}, "samples.parts: 99 parts, but only 3 classes to draw; use fewer"),
    ],
)
def test_words_of_a_pipeline_are_those_of_its_tools(cluster: Path, stages: dict[str, object], message: str) -> None:
    assert message in refused(cluster, "pipeline", pipeline(cluster, **stages))


def test_the_commands_of_the_shipped_pipeline() -> None:
    stages = yaml.safe_load((tiny_run.ROOT / "slurm/pipeline_imagenet256.yaml").read_text())
    for tool, stage in (("build_shards", "shards"), ("precompute", "precompute")):
        for command in stages[stage]["commands"]:
            check_words(tool, command.split())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("init_weights=/nope", "init_weights: /nope: no such file or directory"),
        ("branch_from=/nope", "branch_from: /nope: no such file or directory"),
        ("branch_from={}/train.tokens", "branch_from: {}/train.tokens: no checkpoint; name a checkpoint of a run"),
        ("data.tokens={}/run", "data.tokens: {}/run: no index.json"),
        ("data.tokens={}/train.features", "data.tokens: {}/train.features: holds features"),
        ("data.features={}/train.tokens", "data.features: {}/train.tokens: holds tokens"),
        ("data.heldout_tokens={}/train.features", "data.heldout_tokens: {}/train.features: holds features"),
        ("model.codebook_size=99", "model.codebook_size: 99, but data.tokens {}/train.tokens has"),
    ],
)
def test_what_the_job_would_say_of_its_data_is_said_at_once(cluster: Path, override: str, message: str) -> None:
    (cluster / "run").mkdir()
    said = refused(cluster, "submit", cluster / "recipe.yaml", "--", override.format(cluster))
    assert message.format(cluster) in said


def test_what_a_run_began_with_may_be_gone(cluster: Path) -> None:
    """pretrain.py does without it once there is a checkpoint."""
    (cluster / "run/checkpoints/step_00000004").mkdir(parents=True)
    mepa(cluster, "submit", cluster / "recipe.yaml", "--dry-run", "--", "init_weights=/gone")
    mepa(cluster, "submit", cluster / "recipe.yaml", "--dry-run", "--", "branch_from=/gone")
    tokenizer_run.make_data(cluster)
    recipe = tokenizer_run.write_recipe(cluster)
    (cluster / "run/checkpoint.pt").touch()
    mepa(cluster, "submit", recipe, "--job", "train-tokenizer", "--dry-run", "--", "start_from=/gone")


def test_what_another_job_makes_need_not_be_there(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cluster / "written.tokens").mkdir()
    (cluster / "written.tokens/index.plan.json").touch()
    words: list[str | Path] = ["submit", cluster / "recipe.yaml", "--dry-run", "--after", "4711", "--"]
    mepa(cluster, *words, "branch_from=/later/checkpoints/step_00000008")
    assert "not there yet, left to job 4711: branch_from\n" in capsys.readouterr().out
    mepa(cluster, *words, "init_weights=/later/last", f"data.tokens={cluster}/written.tokens")
    assert "not there yet, left to job 4711: data.tokens, init_weights" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"data\.tokens: .* holds features"):
        mepa(cluster, *words, f"data.tokens={cluster}/train.features")


def test_a_cache_on_the_nodes_is_not_looked_for(cluster: Path) -> None:
    urls = tuple(map(str, sorted((cluster / "train.tokens").glob("*.tar"))))
    remote = RemoteShards(urls=urls, cache="$OF_THE_JOB/shards", cache_gigabytes=1.0, window=1)
    remote.write(cluster / "train.tokens")
    mepa(cluster, "submit", cluster / "recipe.yaml", "--dry-run")


def test_a_pipeline_may_make_an_online_runs_teacher(cluster: Path) -> None:
    tokenizer_run.make_data(cluster)
    values = yaml.safe_load((cluster / "recipe.yaml").read_text())
    online = [f"data.images={cluster}/images", "data.tokens=null", "data.features=null", "data.teacher.name=patch-pca"]
    values = apply_overrides(values, [*online, f"data.teacher.weights={cluster}/teacher", "data.heldout_tokens=null"])
    (cluster / "recipe.yaml").write_text(yaml.safe_dump(values))
    teacher = {"commands": [f"fit-teacher patch-pca {cluster}/images --out {cluster}/teacher"]}
    with pytest.raises(UserError, match=r"data\.teacher\.weights: .*teacher: no such file"):
        mepa(cluster, "pipeline", pipeline(cluster), "--dry-run")
    mepa(cluster, "pipeline", pipeline(cluster, teacher=teacher), "--dry-run")


def test_weights_that_a_recipe_reads_must_be_there(cluster: Path) -> None:
    online = ["data.images=x", "data.tokens=null", "data.features=null", "data.teacher.name=patch-pca"]
    tokenizer_run.make_data(cluster)
    online[0] = f"data.images={cluster}/images"
    said = refused(cluster, "submit", cluster / "recipe.yaml", "--", *online, "data.teacher.weights=/nope")
    assert "data.teacher.weights: /nope: no such file" in said
    recipe = tokenizer_run.write_recipe(cluster)
    for override in ("start_from=/nope", "loss.perceptual.backbone_weights=/nope"):
        said = refused(cluster, "submit", recipe, "--job", "train-tokenizer", "--", override)
        assert f"{override.split('=')[0]}: /nope: no such file" in said


def test_overrides_stand_at_the_end(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        mepa(cluster, "submit", cluster / "recipe.yaml", "--dry-run", "optim.base_lr=2e-4")
    assert "unrecognized arguments: optim.base_lr=2e-4; put key=value words at the end, after --" in (
        capsys.readouterr().err
    )


def test_a_tokenizers_batch_must_fit_the_ranks(cluster: Path) -> None:
    tokenizer_run.make_data(cluster)
    recipe = tokenizer_run.write_recipe(cluster, "train.global_batch=9")
    message = refused(cluster, "submit", recipe, "--job", "train-tokenizer")
    assert message.startswith("train.global_batch (9) must be a multiple of 2 ranks x train.accumulation (1) = 2")


def test_a_copy_is_made_once(cluster: Path) -> None:
    """Later jobs find it; a set that was made anew is copied anew."""
    recipe, scratch = cluster / "recipe.yaml", cluster / "scratch"
    places = [target for _, source, target in sets_to_copy(scratch, recipe, ()) if copy_set(source, target)]
    assert len(places) == 3
    assert {p.name for p in (cluster / "train.tokens").iterdir()} == {p.name for p in places[0].iterdir()}
    assert not any(copy_set(source, target) for _, source, target in sets_to_copy(scratch, recipe, ()))
    index = cluster / "train.tokens/index.json"
    index.write_text(index.read_text() + "\n")
    again = [key for key, source, target in sets_to_copy(scratch, recipe, ()) if copy_set(source, target)]
    assert again == ["data.tokens"]


START = "=== 2026-01-01 10:00:00 job 7, start {}: 1 nodes (n1) x 2 ranks, srun, n1:10128\n"


def test_the_last_error_is_that_of_the_last_start_that_failed() -> None:
    log = (
        START.format(1) + "error: first\nerror: what it took down\n" + START.format(2) + "error: second\nerror: more\n"
    )
    assert last_error(log) == "second"
    assert last_error(log + START.format(3) + "step 1/40\n=== 2026-01-01 10:01:00 asked to stop (signal)\n") == "second"
    assert last_error(START.format(1)) is None


def test_status_follows_the_newest_job(cluster: Path) -> None:
    """A pending job that was submitted after the last owner, among jobs of other stages."""
    record = cluster / "run/slurm"
    record.mkdir(parents=True)
    (record / "owner").write_text("7 2\n")
    (cluster / "job-8").write_text("JobId=8 JobState=PENDING Reason=Priority Restarts=0\n")
    moment = (record / "owner").stat().st_mtime

    def submitted(*jobs: tuple[str, Path, float]) -> None:
        lines = [json.dumps({"job": job, "state": str(state), "time": time}) for job, state, time in jobs]
        (record / "jobs.jsonl").write_text("\n".join(lines))

    submitted(("8", record, moment + 1), ("9", record / "samples", moment + 2))
    report = status(cluster / "run")
    assert (report["job"], report["state"], report["waits for"]) == ("8", "PENDING", "Priority")
    submitted(("7", record, moment - 1), ("9", record / "samples", moment + 2))
    report = status(cluster / "run")
    assert (report["job"], report["state"]) == ("7", "forgotten by SLURM")


def test_status_of_a_tokenizers_training(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cluster / "run"
    (run / "slurm").mkdir(parents=True)
    (run / "slurm/owner").write_text("7 0\n")
    (run / "checkpoint.pt").touch()
    (run / "resolved.yaml").write_text("train: {steps: 100, global_batch: 8}\n")
    record = {"event": "train", "step": 50, "loss": 1.0, "images_per_second": 4.0}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    monkeypatch.setenv("NO_JOB", "slurm_load_jobs error: Unable to contact slurm controller")
    report = status(run)
    assert (report["step"], report["time left"]) == ("50 of 100", "0:01:40")
    assert report["last checkpoint"] == f"{run}/checkpoint.pt"
    assert "Unable to contact slurm controller" in report["state"]


def test_a_dry_run_where_there_is_no_slurm_says_what_it_has_not_checked(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All else is checked, and the sbatch line is shown. To submit needs SLURM."""
    monkeypatch.setattr(shutil, "which", lambda command: None)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    mepa(cluster, "submit", cluster / "recipe.yaml", "--dry-run")
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("no SLURM here (scontrol or sbatch is not found, or ")
    assert "Not checked: whether partition gpu exists" in said[0]
    assert said[-1].startswith("sbatch --parsable ")
    assert "unknown key" in refused(cluster, "submit", cluster / "recipe.yaml", "--dry-run", "--", "model.dept=3")
    assert refused(cluster, "submit", cluster / "recipe.yaml").startswith("scontrol: ")
