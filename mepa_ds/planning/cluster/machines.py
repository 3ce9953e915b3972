"""A cluster in numbers, and what the simulation assumes of it.

Bandwidths are of one direction. Sources: NVIDIA's data sheets of H100 SXM (989 TFLOP/s dense bf16, 80 GB at 3.35 TB/s,
NVLink 900 GB/s both ways), H200 (141 GB at 4.8 TB/s), A100 SXM (312 TFLOP/s, 80 GB at 2.04 TB/s, NVLink 600 GB/s both
ways) and B200 (2250 TFLOP/s, 180 GB at 8 TB/s, NVLink 1.8 TB/s both ways); of DGX H100 (eight 400 Gb/s ports) and DGX
A100 (eight 200 Gb/s ports) for the network between nodes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from mepa_ds.errors import UserError
from mepa_ds.objective.flops import PEAK_FLOPS


@dataclass(frozen=True)
class Cluster:
    """Rates are peaks of one device, per second; bandwidths in bytes."""

    ranks_per_node: int
    """Each rank has a device of its own."""
    device_memory: float | None
    """Bytes; None: not compared."""
    peak_flops: float
    memory_bandwidth: float
    node_bandwidth: float
    """From a device to the others of its node."""
    network_bandwidth: float
    """From a device to other nodes; each device has its own port."""
    storage_bandwidth: float
    """What a node reads of the shared file system."""
    storage_total: float
    """What the file system gives all nodes together."""


@dataclass(frozen=True)
class DeviceRates:
    """Peaks of a kind of device as in `Cluster`, in its usual node."""

    peak_flops: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float


DEVICES = {
    "a100": DeviceRates(PEAK_FLOPS["A100"], 2.04e12, 300e9, 25e9),
    "h100": DeviceRates(PEAK_FLOPS["H100"], 3.35e12, 450e9, 50e9),
    "h200": DeviceRates(PEAK_FLOPS["H200"], 4.8e12, 450e9, 50e9),
    "b200": DeviceRates(PEAK_FLOPS["B200"], 8.0e12, 900e9, 50e9),
}
"""By a part of the name that SLURM has for them (MEPA_GPU_TYPE)."""
STORAGE_BANDWIDTH, STORAGE_TOTAL = 5e9, 100e9
"""Assumed of the shared file system where the profile does not say."""


@dataclass(frozen=True)
class Assumptions:
    """Estimates, not measurements, until a GPU has run this code. Each is an option."""

    matrix_share: float = 0.63
    """Share of the peak that matrix products and attention reach (620 of 989 TFLOP/s on an H100)."""
    expert_share: float = 0.51
    """The same of the routed experts' grouped products (500 of 989 TFLOP/s)."""
    memory_share: float = 0.78
    """Share of the memory's bandwidth that all other operators reach (2.6 of 3.35 TB/s)."""
    traffic_share: float = 1.0
    """Share of the other operators' bytes that fusing them leaves: 1 if nothing is fused; compiling leaves less."""
    link_share: float = 0.8
    """Share of NVLink's and the network's bandwidth that collectives reach."""
    hidden_share: float = 0.8
    """Of a transfer that runs beside computation, the part that computation hides; the rest is time lost to both."""
    imbalance: float = 1.1
    """With expert parallelism: rows of the rank with the most, over the mean; all wait for that rank."""
    launch_us: float = 5.0
    """Microseconds that Python and PyTorch take to launch an operator."""
    latency_us: float = 15.0
    """Microseconds of a message, however short; a collective of n ranks takes log2(n) of them."""
    usable_memory: float = 0.9
    """Share of a device's memory that a plan may fill; the allocator and NCCL have the rest."""
    launches_ahead: bool = True
    """A device works while its host launches the next operators; a CPU does not."""

    def check(self) -> None:
        """Raises UserError for numbers that no machine has."""
        for name, value in asdict(self).items():
            least = 1.0 if name == "imbalance" else 0.0
            divides = name in ("matrix_share", "expert_share", "memory_share", "link_share", "usable_memory")
            most = 1.0 if name.endswith("_share") or name == "usable_memory" else math.inf
            if not least <= value <= most or (divides and value == 0):
                bounds = f"{'above' if divides else 'at least'} {least:g}"
                bounds += f", at most {most:g}" if most == 1 else ""
                raise UserError(f"--assume.{name.replace('_', '-')} {value:g}: expected a number {bounds}")
