"""The dry run against what really happens: FLOPs counted by PyTorch, memory of real ranks, lengths, messages."""

from __future__ import annotations

import ctypes
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mepa_ds import distributed
from mepa_ds.checkpoint.files import list_checkpoints
from mepa_ds.cli.pretrain import main
from mepa_ds.config.base import load_config, validate
from mepa_ds.config.model import ModelConfig
from mepa_ds.config.objective import AlignmentConfig
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.errors import UserError
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.objective import flops
from mepa_ds.objective.alignment import Projector
from mepa_ds.planning.frozen_networks import plan_networks
from mepa_ds.planning.plan import KEPT_NAME, Machine, Plan, format_plan, plan_run, this_machine
from mepa_ds.runtime import recorder
from mepa_ds.runtime.metrics import read_metrics
from mepa_ds.teachers.registry import TEACHERS
from mepa_ds.tokenizer.tokenizer import Tokenizer
from tests.ranks import Ranks
from tests.tiny_run import launch, make_run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "values",
    [
        {"moe": None},
        {"moe": {"num_experts": 4, "every": 2}},
        {"moe": {"num_experts": 8, "router": "smoe", "shared_expert": False}, "shared_adaln": True},
        {"moe": {"num_experts": 4, "top_k": 1, "expert_ratio": 1.0}, "scales": [1, 2, 3, 4, 6]},
    ],
)
def test_the_formula_counts_what_pytorch_counts(values: dict[str, Any]) -> None:
    """Within 2 %, forward and backward, with the projector."""
    small = {"depth": 4, "width": 128, "num_heads": 4, "codebook_size": 256, "scales": [1, 2, 3, 5, 8]}
    config = validate(ModelConfig, small | values, "test")
    alignment = AlignmentConfig(scales=(2, 3), projector_hidden=64)
    model = NextScaleTransformer(config)
    projector = Projector(config.C, 64, 24)
    labels_B = torch.zeros(2, dtype=torch.int64)
    inputs_BLZ = torch.randn(2, config.schedule.num_tokens - 1, config.code_width)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = model(labels_B, inputs_BLZ, hidden_after=1)
        assert output.hidden_BLC is not None
        aligned = projector(output.hidden_BLC[:, : config.schedule.bounds[2][1]])
        (output.logits_BLV.sum() + aligned.sum()).backward()
    formula = 2 * 3 * (flops.forward_flops(config) + flops.projector_flops(config, alignment, 24))
    assert formula == pytest.approx(counter.get_total_flops(), rel=0.02)


def give_freed_memory_back() -> None:
    """Runs in each rank's process before the run. Ranks keep what is freed; without that, what is allocated is seen."""
    distributed.keep_freed_memory = lambda: None
    m_mmap_threshold = -3
    assert ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 16) == 1
    leave_libraries_out()


def leave_libraries_out() -> None:
    """Takes pages of files, which are libraries, out of a rank's peak from its first reading on: they are in memory as
    far as the kernel maps them on first use, which is more of a library that has just been installed."""
    peak, first_bytes = recorder.peak_resident_bytes, list[int]()

    def of_what_is_allocated() -> int:
        found = re.search(r"^RssFile:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert found is not None
        first_bytes.append(int(found[1]) * 1024)
        return peak() - (first_bytes[-1] - first_bytes[0])

    recorder.peak_resident_bytes = of_what_is_allocated


def allocated(plan: Plan) -> float:
    """The peak of a plan without the freed memory that the C library keeps, which is not measured here."""
    moments = (plan.backward, plan.optimizer, plan.encoding)
    return max(sum(size for part, size in parts.items() if part != KEPT_NAME) for parts in moments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of 15M parameters, and activations of about twice their size."""
    folder = tmp_path_factory.mktemp("plan")
    sizes = ["model.depth=3", "model.width=320", "model.num_heads=5", "model.moe.num_experts=4", "train.steps=2"]
    make_run(folder, *sizes, "train.global_batch=160", "log.checkpoint_every=1", "data.heldout_tokens=null")
    return folder


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, []),
        (2, ["parallel.ep_size=2"]),
        pytest.param(1, ["parallel.activation_checkpointing=blocks", "optim.ema=0.99"], marks=pytest.mark.slow),
        pytest.param(1, [f"parallel.deepspeed={ROOT}/ds_configs/zero1.json"], marks=pytest.mark.slow),
        pytest.param(1, ["train.accumulation=2"], marks=pytest.mark.slow),
    ],
    ids=["1", "2", "blocks", "zero1", "accumulation"],
)
def test_memory_is_that_of_real_ranks(
    folder: Path, ranks: int, settings: list[str], request: pytest.FixtureRequest
) -> None:
    """What is allocated at the peak on CPU ranks, within 15 %."""
    output = folder / f"run_{request.node.callspec.id}"
    settings = [f"output_dir={output}", *settings]
    log = folder / f"{output.name}.log"
    with Ranks([str(folder / "recipe.yaml"), *settings], ranks, log, prepare=give_freed_memory_back) as started:
        assert started.wait() == [0] * ranks, log.read_text()
    records = list(read_metrics(output / "metrics.jsonl"))
    measured = max(record["peak_memory_bytes"] for record in records if record["event"] == "train")
    before = next(record["memory_before_bytes"] for record in records if record["event"] == "start")
    config = load_config(PretrainConfig, folder / "recipe.yaml", settings)
    plan = plan_run(config, Machine(ranks, is_gpu=False, memory=None, process=before))
    planned = allocated(plan)
    print(f"planned {planned / 1e6:.0f} MB, measured {measured / 1e6:.0f}, of these {before / 1e6:.0f} before")
    assert planned == pytest.approx(measured, rel=0.15)
    own, theirs = planned - before, measured - before  # what the process has before counts alike
    assert own == pytest.approx(theirs, rel=0.25)
    (checkpoint,) = list_checkpoints(output / "checkpoints")[-1:]
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    assert plan.checkpoint == pytest.approx(size, rel=0.02)
    assert plan.step_flops == records[0]["step_flops"]


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, ["parallel.ep_size=2"]),
        pytest.param(1, [], marks=pytest.mark.slow),
        pytest.param(1, ["train.accumulation=2"], marks=pytest.mark.slow),
    ],
    ids=["2", "1", "accumulation"],
)
def test_the_commands_own_number_is_that_of_an_untouched_run(
    folder: Path, ranks: int, settings: list[str], request: pytest.FixtureRequest
) -> None:
    """Peak resident memory of a rank, within 15 %, with what the C library keeps."""
    output = folder / f"untouched_{request.node.callspec.id}"
    words = [str(folder / "recipe.yaml"), f"output_dir={output}", "train.steps=4", *settings]
    planned = launch([*words, "--dry-run", "--world-size", str(ranks), "--memory", "1000"]).stdout
    (line,) = (line for line in planned.splitlines() if line.startswith("fits: "))
    number, unit = line.split()[1:3]
    run = launch(words, ranks)  # not forked from a process that has imported more
    assert run.returncode == 0, run.stderr
    records = [record for record in read_metrics(output / "metrics.jsonl") if record["event"] == "train"]
    measured = max(record["peak_memory_bytes"] for record in records)
    print(f"planned {number} {unit}, measured {measured / 1e6:.0f} MB")
    assert float(number) * {"GB": 1e9, "MB": 1e6}[unit] == pytest.approx(measured, rel=0.15)


@cache
def plan_of_the_large_recipe() -> Plan:
    """As it stands, on 8 GPUs of 80 GB. A plan takes seconds: the model's own code runs, without numbers."""
    config = load_config(PretrainConfig, ROOT / "recipes/mepa_d16.yaml")
    return plan_run(config, Machine(8, is_gpu=True, memory=80e9, process=0), num_samples=1_281_167)


def test_the_large_recipe_fits_on_8_gpus_of_80_gb() -> None:
    plan = plan_of_the_large_recipe()
    assert plan.problems == []
    assert plan.peak < 0.85 * 80e9, "the allocator and NCCL need some too"


def test_the_accumulation_that_is_proposed_divides_the_batch_and_fits() -> None:
    """A third of 91 images a rank would do, but does not divide them."""
    settings = ["model.preset=mepa-d4", "train.accumulation=1", "train.global_batch=728"]
    machine = Machine(8, is_gpu=True, memory=5e9, process=0)
    plan = plan_run(load_config(PretrainConfig, ROOT / "recipes/mepa_d16.yaml", settings), machine, 1000)
    assert "try train.accumulation=7 or" in plan.problems[0]
    settings[1] = "train.accumulation=7"
    mended = plan_run(load_config(PretrainConfig, ROOT / "recipes/mepa_d16.yaml", settings), machine, 1000)
    assert mended.problems == []


def test_the_large_recipe_is_planned_without_data_or_gpus() -> None:
    config = load_config(PretrainConfig, ROOT / "recipes/mepa_d16.yaml", ["train.accumulation=1"])
    plan = plan_run(config, Machine(8, is_gpu=True, memory=80e9, process=0), num_samples=1_281_167)
    text = format_plan(plan)
    assert "1384.8M parameters, 579.0M active; on a rank 134.3M routed experts" in text
    assert "166819 steps of 768 images" in text
    assert "does not fit: a rank needs " in text
    assert "try train.accumulation=2 or parallel.activation_checkpointing=blocks" in text
    # bf16: 2 bytes a weight; 12 bytes a parameter over the ranks that share it: all 8, or 1 for experts at ep_size 8.
    held = plan.held
    others = held["transformer"] + held["projector"]
    assert plan.backward["weights"] == 2 * (held["routed experts"] + others)
    assert plan.backward["masters and Adam moments"] == 12 * (held["routed experts"] + others / 8)
    assert plan.checkpoint == 12 * (8 * held["routed experts"] + others)
    one_way = 2 * 96 * 680 * 1024 * 2 * 7 / 8
    assert plan.exchanged["tokens, all-to-all (2 forward, 2 backward)"] == 4 * 16 * one_way
    settings = ["train.accumulation=1", "parallel.activation_checkpointing=blocks"]
    config = load_config(PretrainConfig, ROOT / "recipes/mepa_d16.yaml", settings)
    plan = plan_run(config, Machine(8, is_gpu=True, memory=None, process=0), num_samples=1)
    assert plan.exchanged["tokens, all-to-all (2 forward, 2 again, 2 backward)"] == 6 * 16 * one_way


def test_the_tokenizer_of_sample_grids_counts(folder: Path) -> None:
    machine = Machine(1, is_gpu=False, memory=None, process=0)
    plans = [
        plan_run(load_config(PretrainConfig, folder / "recipe.yaml", settings), machine)
        for settings in ([], ["log.sample_every=1"])
    ]
    size = (folder / "tokenizer/model.safetensors").stat().st_size
    assert allocated(plans[1]) - allocated(plans[0]) == pytest.approx(size, rel=0.1)


def test_a_tokenizer_that_is_being_trained_is_planned_by_its_recipe(folder: Path, tmp_path: Path) -> None:
    settings = ["log.sample_every=1", f"tokenizer={tmp_path}"]
    machine = Machine(1, is_gpu=False, memory=None, process=0)

    def planned() -> Plan:
        return plan_run(load_config(PretrainConfig, folder / "recipe.yaml", settings), machine)

    (tmp_path / ".lock").touch()
    assert planned().assumed == [f"a tokenizer of the size of VAR's (no {tmp_path} to read it from)"]
    done = Tokenizer.open(folder / "tokenizer")
    recipe = {"output_dir": "x", "data": {"images": "y"}, "train": {"global_batch": 8, "steps": 1}}
    recipe["tokenizer"] = done.config.model_dump(mode="json")
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(recipe))
    plan = planned()
    (line,) = plan.assumed
    assert line == f"the tokenizer that {tmp_path}/resolved.yaml describes: its training has not finished"
    size = sum(tensor.nbytes for tensor in done.state_dict().values())
    assert plan.backward["tokenizer of samples"] == size


def test_the_buffers_of_all_to_alls_are_a_part_of_their_own() -> None:
    """Rows that come back are kept for the backward pass of all 4 layers, but where blocks are computed again."""
    one_way = 48 * 680 * 2 * 256 * 2  # 48 images of 680 tokens that go to 2 experts, 256 wide in bf16
    for checkpointing, layers in (("none", 4), ("blocks", 0)):
        settings = ["model.preset=mepa-d4", f"parallel.activation_checkpointing={checkpointing}"]
        plans = [
            plan_run(
                load_config(PretrainConfig, ROOT / "recipes/mepa_d16.yaml", [*settings, f"parallel.ep_size={ep_size}"]),
                Machine(8, is_gpu=True, memory=None, process=0),
                num_samples=1,
            )
            for ep_size in (1, 8)
        ]
        assert plans[0].backward["all-to-all buffers"] == 0
        assert layers <= plans[1].backward["all-to-all buffers"] / one_way <= layers + 2
        text = format_plan(plans[1])
        assert ("  all-to-all buffers " in text) == bool(layers)
        assert all(value >= 0 for value in plans[1].backward.values())


ONLINE = ["data.tokens=null", "data.features=null", "data.images=nowhere", "data.teacher.weights=hub"]


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("dinov3-l", 1024),
        pytest.param("dinov2-b", 768, marks=pytest.mark.slow),
        pytest.param("vit_small_patch16_224", 384, marks=pytest.mark.slow),
    ],
)
def test_tokenizer_and_teacher_of_an_online_run_count(name: str, width: int) -> None:
    """Neither their weights nor images are there: sizes are those of VAR's tokenizer and timm's architectures."""
    stored, machine = plan_of_the_large_recipe(), Machine(8, is_gpu=True, memory=80e9, process=0)
    settings = [*ONLINE, f"data.teacher.name={name}"]
    online = plan_run(load_config(PretrainConfig, ROOT / "recipes/mepa_d16.yaml", settings), machine, num_samples=1)
    assert not stored.encoding
    parameters = {"dinov2-b": 86.6e6, "dinov3-l": 303.1e6, "vit_small_patch16_224": 21.7e6}[name]
    for parts in (online.backward, online.optimizer, online.encoding):
        assert parts["tokenizer and teacher"] == pytest.approx(4 * (108.9e6 + parameters), rel=0.01)
    # At 48 images a tensor of the encoder's first layers has 2 GB: 160 channels of 256 x 256 pixels.
    assert 3 * 2.01e9 < online.encoding["tokenizer or teacher at work"] < 6 * 2.01e9
    head = online.held["projector"] - stored.held["projector"]
    assert head == (width - 768) * (stored_hidden(online) + 1)
    assert "a tokenizer of the size of VAR's" in format_plan(online)
    assert "memory of a rank while images are encoded: " in format_plan(online)
    assert online.problems == []
    small = plan_run(online.config, Machine(8, is_gpu=True, memory=30e9, process=0), num_samples=1)
    assert "try train.accumulation=" in small.problems[0]


def stored_hidden(plan: Plan) -> int:
    alignment = plan.config.objective.alignment
    assert alignment is not None
    return alignment.projector_hidden


@pytest.mark.slow
def test_every_teacher_of_the_registry_has_a_plan() -> None:
    for name in TEACHERS:
        plan = plan_networks(online_config(name, "nowhere"), batch=1)
        assert plan.teacher_patches == 256
        assert plan.teacher_width is not None
        assert plan.teacher_width >= 64


def test_a_teacher_that_cannot_be_planned_is_refused() -> None:
    with pytest.raises(UserError, match="teacher 'dinov9' is unknown"):
        plan_networks(online_config("dinov9", "hub"), batch=1)
    with pytest.raises(UserError, match="timm's beit_base_patch16_224 is not a plain ViT"):
        plan_networks(online_config("beit_base_patch16_224", "hub"), batch=1)


def online_config(name: str, weights: str) -> PretrainConfig:
    settings = [*ONLINE, f"data.teacher.name={name}", f"data.teacher.weights={weights}"]
    return load_config(PretrainConfig, ROOT / "recipes/mepa_d16.yaml", settings)


def test_the_command_prints_the_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(folder / "recipe.yaml"), "--dry-run", "--world-size", "2", "parallel.ep_size=2", "--memory", "0.1"])
    text = capsys.readouterr().out
    assert "plan: 2 ranks, each with a CPU, ep_size 2, fp32, 80 images a rank and pass" in text
    assert "does not fit: a rank needs " in text
    assert "use more ranks, a larger parallel.ep_size or less model" in text
    assert not (folder / "run").exists()


def test_wrong_options_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(folder / "recipe.yaml")
    with pytest.raises(UserError, match=r"must be a multiple of ranks x train\.accumulation"):
        main([recipe, "--dry-run", "--world-size", "7"])
    with pytest.raises(SystemExit):
        main([recipe, "--world-size", "2"])
    assert "belong to --dry-run" in capsys.readouterr().err


def test_this_machine_has_memory_for_its_ranks(folder: Path) -> None:
    config = load_config(PretrainConfig, folder / "recipe.yaml")
    one, two = (this_machine(config, ranks, None) for ranks in (1, 2))
    assert one.memory is not None
    assert two.memory == one.memory / 2
    assert 1e8 < one.process < one.memory
