"""Training on a real SLURM: several nodes, signals, preemption, dead and cut-off nodes, many jobs, crash loops."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mepa_ds.config.base import dump_yaml
from tests import tiny_run
from tests.on_request import FULL
from tests.slurm.bed import ROOT, STEPS, Bed, Run, broken_deepspeed, scenario
from tests.train_tokenizer import training_run as tokenizer_run

Outcome = Callable[[str], Any]
EP2 = "parallel.ep_size=2"
FAILING = "--partition=failing"
JOBS = 10 if FULL else 4
STOPS = ("step_9", "step_17", "step_25") if FULL else ("step_9", "step_25")


def assert_same(run: Run, reference: Run, atol: float = 0) -> None:
    assert run.wait() == "COMPLETED", run.text
    assert len(run.losses) == STEPS
    np.testing.assert_allclose(run.losses, reference.losses, atol=atol, rtol=0, err_msg=run.text)


def stop_by_time_limit(run: Run) -> None:
    """The limit comes so near that SLURM sends the signal when it next looks, which it does every 30 s."""
    cluster, before = run.bed.cluster, run.text.count("asked to stop")
    hours, minutes, seconds = map(int, cluster.job(run.job)["RunTime"].split(":"))
    # Whole minutes, and never so near that the job would end before the signal.
    limit = 60 * hours + minutes + (1 if seconds < 20 else 2)
    cluster.check("scontrol", "update", f"JobId={run.job}", f"TimeLimit={limit}")
    cluster.wait_for(lambda: run.text.count("asked to stop") > before, 300, lambda: run.text)
    cluster.check("scontrol", "update", f"JobId={run.job}", "TimeLimit=60")


@scenario
def interrupted(bed: Bed) -> Run:
    """Asked to stop by the time limit: twice, or three times with MEPA_FULL_TESTS=1."""
    places = STOPS
    gates = bed.gates("interrupted", *places)
    run = bed.train("interrupted", EP2, options=("--time=60", "--signal=B:USR1@60"), gates=gates)
    for place in places:
        gates.wait(place, 2)
        stop_by_time_limit(run)
        gates.wait_noted(0)
        gates.open(place)
    run.wait_start(len(places) + 1)
    run.wait()
    return run


def test_interrupted(outcome: Outcome, reference: Run) -> None:
    run = outcome("interrupted")
    assert_same(run, reference)
    assert run.restarts == len(STOPS)
    assert run.text.count("asked to stop (signal)") == len(STOPS)
    assert run.steps_computed == STEPS  # every stop saved where it was
    # Every step saw the same images: their number, and what the model made of them scale by scale, to the bit.
    seen = ("step", "images", "ce_scale", "accuracy_scale", "alignment", "balance", "grad_norm")
    assert [[r[key] for key in seen] for r in run.records] == [[r[key] for key in seen] for r in reference.records]
    assert "error: slurm:" not in run.text


@scenario
def quickstart_recipe(bed: Bed) -> Run:
    """The quickstart's own recipe, on data of this test."""
    tiny = tiny_run.recipe_values(bed.folder)
    words = [f"{key}={tiny['data'][key]}" for key in ("tokens", "features", "heldout_tokens")]
    words = [f"tokenizer={tiny['tokenizer']}", *(f"data.{word}" for word in words), "train.steps=4", "log.every=1"]
    words += [f"model.{key}={tiny['model'][key]}" for key in ("num_classes", "scales", "codebook_size", "code_width")]
    run = bed.train("quickstart", *words, recipe=ROOT / "recipes/quickstart.yaml")
    run.wait()
    return run


def test_quickstart_recipe(outcome: Outcome) -> None:
    run = outcome("quickstart_recipe")
    assert run.wait() == "COMPLETED", run.text
    assert "2 ranks, ep_size 2" in run.text
    assert [r["step"] for r in run.records] == [1, 2, 3, 4]
    assert (run.output / "last/model.safetensors").is_file()


@scenario
def lost_nodes(bed: Bed) -> dict[str, Run]:
    """A node powered off in mid-training and back; then one cut off from the network; then one taken by others."""
    cluster = bed.cluster
    # SLURM goes on sending a lost node the order to end the job, up to a minute after it is back: that kills the next
    # start too, now and then. Checkpoints are close together here, so that such starts make progress.
    gates = bed.gates("powered", "step_6")
    powered = bed.train("powered", EP2, "log.checkpoint_every=4", nodes=2, ranks=1, options=(FAILING,), gates=gates)
    gates.wait("step_6", 2)
    cluster.power_off("n4")
    gates.open("step_6")
    # Not sinfo: it says "comp" of a node that is down while a job's end is still to be told to it.
    cluster.wait_for(lambda: "DOWN" in cluster.run("scontrol", "show", "node", "n4").stdout, 60, cluster.logs)
    cluster.power_on("n4")
    powered.wait()

    gates = bed.gates("cut", "step_6", "step_11")
    cut = bed.train("cut", "log.checkpoint_every=4", ranks=1, options=(FAILING,), gates=gates)
    gates.wait("step_6")
    bed.kill(cut)  # as for want of memory: nobody is left to say why
    gates.open("step_6")
    gates.wait("step_11")
    node = cluster.job(cut.job)["NodeList"]
    old = bed.freeze(cut)  # as if it were in a long step; it knows nothing of what happens to the run
    cluster.cut(node)
    gates.open("step_11")
    cut.wait_start(3)
    cluster.wait_for(lambda: not set(old) & set(bed.ranks_of(cut)), 15)  # it sees the run's files, and has ended
    cut.wait()
    cluster.power_off(node)
    cluster.heal(node)
    cluster.power_on(node)

    gates = bed.gates("preempted", "step_9")
    preempted = bed.train("preempted", ranks=1, options=(FAILING,), gates=gates)
    gates.wait("step_9")
    node = cluster.job(preempted.job)["NodeList"]
    urgent = ("--partition=urgent", f"--nodelist={node}", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    cluster.check("sbatch", *urgent)
    gates.wait_noted(0)
    gates.open("step_9")
    preempted.wait_start(2)
    preempted.wait()
    return {"powered": powered, "cut": cut, "preempted": preempted}


def test_lost_nodes(outcome: Outcome, reference: Run) -> None:
    runs = outcome("lost_nodes")
    assert_same(runs["powered"], reference)
    assert runs["powered"].restarts >= 1
    assert_same(runs["cut"], reference, atol=1e-5)  # one rank, not two
    assert_same(runs["preempted"], reference, atol=1e-5)
    assert runs["preempted"].steps_computed == STEPS
    places = [line.partition("(")[2].partition(")")[0] for line in runs["cut"].text.splitlines() if ", start " in line]
    assert sorted(set(places)) == ["n3", "n4"]


@scenario
def two_nodes(bed: Bed) -> Run:
    """With a copy of the data on each node, where no other scenario puts any."""
    profile = bed.folder / "shm.env"
    profile.write_text((ROOT / "slurm/clusters/ci.env").read_text() + "MEPA_SCRATCH=/dev/shm\n")
    run = bed.train("two_nodes", EP2, nodes=2, MEPA_HEALTH="on", MEPA_STAGE="on", MEPA_CLUSTER=str(profile))
    run.wait()
    return run


def test_two_nodes(outcome: Outcome, reference: Run) -> None:
    """2 x 2 ranks with experts over both have the losses of one node."""
    run = outcome("two_nodes")
    assert_same(run, reference, atol=1e-5)
    assert "4 ranks on 2 nodes are well" in run.text
    assert "4 ranks, ep_size 2" in run.text
    copied = [
        line.partition(":")[0] for line in run.text.splitlines() if f"-> /dev/shm/mepa_ds-{os.getuid()}/shards/" in line
    ]
    assert sorted(copied) == ["n1"] * 3 + ["n2"] * 3  # three sets, once a node


@scenario
def torchrun(bed: Bed) -> Run:
    gates = bed.gates("torchrun", "step_9")
    run = bed.train("torchrun", EP2, nodes=2, ranks=1, gates=gates, MEPA_LAUNCHER="torchrun")
    gates.wait("step_9", 2)
    bed.cluster.check("scancel", "--signal=USR1", "--batch", run.job)
    gates.wait_noted(0)
    gates.open("step_9")
    run.wait_start(2)
    run.wait()
    return run


def test_torchrun(outcome: Outcome, reference: Run) -> None:
    """The other launcher, over two nodes, interrupted once."""
    run = outcome("torchrun")
    assert_same(run, reference)
    assert run.restarts == 1
    assert run.steps_computed == STEPS


@scenario
def crash_loop(bed: Bed) -> dict[str, Run]:
    no_gpus = bed.folder / "no_gpus.env"
    no_gpus.write_text("MEPA_ACCELERATOR=cuda\nMEPA_MAX_RESTARTS=1\nMEPA_INTERFACE=eth0\n")
    broken = str(broken_deepspeed(bed.folder))
    runs = {
        "crash": bed.train("crash", ranks=1, PYTHONPATH=broken),
        "sick": bed.train("sick", ranks=1, MEPA_HEALTH="on", MEPA_CLUSTER=str(no_gpus)),
    }
    for run in runs.values():
        run.wait()
    return runs


def test_crash_loop(bed: Bed, outcome: Outcome) -> None:
    """A crash is tried again up to the bound; so is an allocation that is not well."""
    runs = outcome("crash_loop")
    crash = runs["crash"]
    assert crash.wait() == "FAILED"
    assert crash.restarts == 2
    expected = "error: RuntimeError: the driver is too old (gave up: 2 restarts without progress)"
    assert crash.text.splitlines()[-1] == expected
    assert (crash.output / "slurm/result").read_text().strip() == expected.replace("error", "failed", 1)
    code, status = bed.mepa("status", crash.output)
    assert code == 0, status
    assert "RuntimeError: the driver is too old" in status.partition("last error")[2].partition("\n")[0]
    assert runs["sick"].wait() == "FAILED"
    assert "error: health: n" in runs["sick"].text.splitlines()[-1]
    assert "0 GPUs visible, but 1 ranks start there" in runs["sick"].text.splitlines()[-1]


@scenario
def many_jobs(bed: Bed) -> list[Run]:
    """Trainings of a tokenizer on two nodes each, all at once: four, or ten with MEPA_FULL_TESTS=1."""
    folder = bed.folder / "tokenizer_runs"
    folder.mkdir()
    tokenizer_run.make_data(folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(yaml.safe_load(dump_yaml(tokenizer_run.config(folder, "train.steps=3")))))
    words: dict[str, Any] = {"nodes": 2, "ranks": 1, "script": "train_tokenizer", "recipe": recipe}
    runs = [bed.train(f"many_{n}", options=("--hold",), **words) for n in range(JOBS)]
    bed.cluster.check("scontrol", "release", ",".join(run.job for run in runs))
    for run in runs:
        run.wait()
    return runs


def test_many_jobs(outcome: Outcome) -> None:
    runs = outcome("many_jobs")
    for run in runs:
        assert run.wait() == "COMPLETED", run.text
        assert (run.output / "model.safetensors").exists()
    ports = [run.text.partition(", n1:")[2].split()[0] for run in runs]
    assert len(set(ports)) == JOBS
    assert max(moment(run, "StartTime") for run in runs) < min(moment(run, "EndTime") for run in runs)


def moment(run: Run, name: str) -> float:
    return time.mktime(time.strptime(run.bed.cluster.job(run.job)[name], "%Y-%m-%dT%H:%M:%S"))


def test_the_clone_is_where_jobs_start(bed: Bed) -> None:
    """Without a profile the log says what to do."""
    log = bed.folder / "no_profile.log"
    command = ["sbatch", "--parsable", f"--output={log}", "slurm/pretrain.sbatch", str(bed.recipe)]
    job = bed.cluster.check(*command, env={"MEPA_CLUSTER": "nowhere"}).strip()
    assert bed.cluster.wait_job(job) == "FAILED"
    assert Path(log).read_text().splitlines()[-1].startswith("error: MEPA_CLUSTER=nowhere: no profile")
