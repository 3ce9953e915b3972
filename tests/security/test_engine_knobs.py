"""`parallel.deepspeed` may be a stranger's file: what it holds tunes the engine, and does nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mepa_ds.engine.deepspeed_config import read_knobs
from mepa_ds.errors import UserError


def read(tmp_path: Path, **more: Any) -> dict[str, Any]:
    zero = {"stage": 2, **more.pop("zero", {})}
    path = tmp_path / "knobs.json"
    path.write_text(json.dumps({"zero_optimization": zero, **more}))
    return read_knobs(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("wandb", {"enabled": True, "project": "x"}, "wandb is no engine knob: the recipe says where numbers go"),
        ("comet", {"enabled": True}, "comet is no engine knob"),
        ("csv_monitor", {"enabled": True, "output_path": "/tmp/x"}, "csv_monitor is no engine knob"),
        ("tensorboard", {"enabled": True, "output_path": "/tmp/x"}, "tensorboard is no engine knob"),
        ("flops_profiler", {"enabled": True, "output_file": "/tmp/x"}, "flops_profiler is no engine knob: it writes"),
        ("comms_logger", {"enabled": True}, "comms_logger is no engine knob"),
        ("dump_state", True, "dump_state is no engine knob"),
        ("autotuning", {"enabled": True, "results_dir": "/tmp/x"}, "autotuning is no engine knob"),
        ("checkpoint", {"writer": {"type": "fast"}}, "checkpoint is no engine knob: checkpoints are written"),
        ("aio", {}, "aio is no engine knob"),
        ("compression_training", {}, "compression_training is no engine knob: the recipe says what is trained"),
        ("data_efficiency", {"enabled": True}, "data_efficiency is no engine knob"),
        ("telemetry", {"url": "https://example.org"}, "telemetry: unknown key; known keys: zero_optimization"),
        ("prescale_gradient", True, "prescale_gradient: unknown key; did you mean 'prescale_gradients'"),
        ("prescale_gradients", "/tmp/x", "prescale_gradients: .*valid boolean"),
        ("communication_data_type", "__class__", "communication_data_type: .*'fp32', 'fp16' or 'bf16'"),
        ("gradient_predivide_factor", 0, "gradient_predivide_factor: .*greater than 0"),
        ("data_types", {"grad_accum_dtype": "int8"}, "grad_accum_dtype"),
        (
            "zero",
            {"offload_param": {"device": "nvme", "nvme_path": "/tmp"}},
            "offload_param is no engine knob: .*ZeRO-3",
        ),
        ("zero", {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}, "offload_optimizer are not supported"),
        ("zero", {"offload_optimizer": {}}, "offload_optimizer"),
        ("zero", {"stage": True}, "stage"),
        ("zero", {"reduce_bucket_size": -1}, "reduce_bucket_size: .*greater than or equal to 1"),
        ("zero", {"reduce_bucket_size": 1e30}, "reduce_bucket_size: .*less than or equal"),
        ("zero", {"reduce_buckets": 5}, "reduce_buckets: unknown key; did you mean 'reduce_bucket_size'"),
    ],
)
def test_what_is_no_knob_is_refused(tmp_path: Path, key: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, **{key: value})
    assert str(error.value).startswith(f"parallel.deepspeed: {tmp_path / 'knobs.json'}: ")


def test_knobs_pass_as_they_are_given(tmp_path: Path) -> None:
    zero = {"stage": 2, "reduce_bucket_size": 5e8, "overlap_comm": False, "allgather_partitions": True}
    more = {"communication_data_type": "fp32", "prescale_gradients": True, "gradient_predivide_factor": 2}
    found = read(tmp_path, zero=zero, **more, data_types={"grad_accum_dtype": "fp32"})
    assert found == {"zero_optimization": zero, **more, "data_types": {"grad_accum_dtype": "fp32"}}
    assert isinstance(found["zero_optimization"]["reduce_bucket_size"], int)


@pytest.mark.parametrize("text", ['{"zero_optimization": ' + "[" * 100_000, "NaN", '{"a": ' * 200 + "1" + "}" * 200])
def test_what_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "knobs.json").write_text(text)
    with pytest.raises(UserError, match="not valid JSON"):
        read_knobs(tmp_path / "knobs.json")
