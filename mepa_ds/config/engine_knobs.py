"""DeepSpeed's settings that are knobs: those that a file of `parallel.deepspeed` may hold, and why not others.

The list is ours and not DeepSpeed's: a key that a new release of it brings may write files, send numbers away or change
what is trained, so it is refused until it has been looked at. Such a file may come from anybody.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mepa_ds.config.base import Section

_TRACKERS = "the recipe says where numbers go (log.wandb_project, log.trackio_project, log.tensorboard)"
_WRITES = "it writes files or measurements of its own; mepa report has a run's numbers"
_CHECKPOINTS = "checkpoints are written and read by this program alone"
_MODEL = "the recipe says what is trained, and how"
_STAGE_3 = "it is for ZeRO-3, which cannot partition expert-parallel layers"
_PARTITIONS = "checkpoints read ZeRO's partitions"
_SET = "this program sets it"

NO_KNOBS = (
    dict.fromkeys(("wandb", "comet", "csv_monitor", "tensorboard", "monitor_config"), _TRACKERS)
    | dict.fromkeys(("flops_profiler", "comms_logger", "dump_state", "autotuning", "log_level"), _WRITES)
    | dict.fromkeys(("aio", "checkpoint", "datastates_ckpt", "nebula"), _CHECKPOINTS)
    | dict.fromkeys(
        (
            "activation_checkpointing",
            "compile",
            "compression_training",
            "curriculum_learning",
            "data_efficiency",
            "elasticity",
            "expert_parallel",
            "hybrid_engine",
            "pipeline",
            "quantize_training",
            "sparse_attention",
            "sparse_gradients",
            "tensor_parallel",
            "weight_quantization",
        ),
        _MODEL,
    )
    | dict.fromkeys(("steps_per_print", "timers", "zero_allow_untested_optimizer", "dataloader_drop_last"), _SET)
)
"""Keys of DeepSpeed's own, and why they are refused."""
NO_ZERO_KNOBS = (
    dict.fromkeys(
        ("offload_param", "cpu_offload_param", "zero_quantized_weights", "zero_quantized_gradients", "sub_group_size"),
        _STAGE_3,
    )
    | dict.fromkeys(("cpu_offload", "zenflow", "parameter_alignment", "legacy_stage1"), _PARTITIONS)
    | dict.fromkeys(("elastic_checkpoint", "load_from_fp32_weights"), _CHECKPOINTS)
    | {"compute_grad_norm": "the log and the detectors need the gradient's norm"}
)
"""As `NO_KNOBS`, of `zero_optimization`."""


def _whole(value: Any) -> Any:
    """DeepSpeed's own examples write sizes as 5e8."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Elements = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=2**40)]
FloatType = Literal["fp32", "fp16", "bf16"]


class ZeroKnobs(Section):
    """`zero_optimization`."""

    stage: int
    contiguous_gradients: bool | None = None
    reduce_scatter: bool | None = None
    reduce_bucket_size: Elements | None = None
    allgather_bucket_size: Elements | None = None
    allgather_partitions: bool | None = None
    use_multi_rank_bucket_allreduce: bool | None = None
    overlap_comm: bool | None = None
    ignore_unused_parameters: bool | None = None
    round_robin_gradients: bool | None = None
    offload_optimizer: None = None


class DataTypes(Section):
    """`data_types`."""

    grad_accum_dtype: FloatType | None = None


class Knobs(Section):
    """A whole file."""

    zero_optimization: ZeroKnobs
    communication_data_type: FloatType | None = None
    prescale_gradients: bool | None = None
    gradient_predivide_factor: Annotated[float, Field(gt=0, le=1e6)] | None = None
    data_types: DataTypes | None = None
    disable_allgather: bool | None = None
    disable_python_gc: bool | None = None
    wall_clock_breakdown: bool | None = None
    memory_breakdown: bool | None = None
