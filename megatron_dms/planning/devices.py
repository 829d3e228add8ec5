"""Numbers of the hardware, and what is assumed about how much of them a run gets."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One accelerator, from its data sheet.

    flops: dense bf16 with fp32 accumulation, per second. memory: bytes. bandwidth: of that memory, bytes/s.
    node_link, network: bytes/s of one device in one direction, within its node and beyond it.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    node_link: float
    network: float
    per_node: int = 8


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device("h100", 989e12, 80e9, 3.35e12, 450e9, 50e9),
        Device("h200", 989e12, 141e9, 4.8e12, 450e9, 50e9),
        Device("a100", 312e12, 80e9, 2.04e12, 300e9, 25e9),
    )
}
"""SXM modules; the network is one 400 Gb/s (A100: 200 Gb/s) port per device. Of the memory a few percent more
can be allocated than the data sheet says."""


@dataclass(frozen=True)
class Assumptions:
    """Shares of the data sheet that are reached, and what is not hidden behind other work.

    All but the last are round numbers near what large products, FlashAttention-2 kernels, streaming kernels
    and NCCL reach on an H100 in public reports, not adapted to any comparison. `slowdown` is the only fitted
    number: one for all runs, the geometric mean of published over predicted time (calibration.py). Nothing
    here was measured with this project, which has not trained on a GPU.
    """

    matmul: float = 0.6
    """Share of `flops` in the products of linear layers."""
    attention: float = 0.3
    """Share of `flops` in attention kernels."""
    memory: float = 0.8
    """Share of `bandwidth` in kernels that only move data."""
    network: float = 0.8
    """Share of both links in collectives and sends."""
    latency: float = 20e-6
    """Seconds for each collective or send, however small."""
    exposed_dp: float = 1.0
    """Share of the gradient's reduction and the parameters' gathering that is waited for. 1: Megatron without
    --overlap-grad-reduce and --overlap-param-gather. TP, CP and PP messages are always waited for."""
    overhead: float = 4e9
    """Bytes of a device that no category has: CUDA context, NCCL's buffers, workspaces, fragmentation."""
    slowdown: float = 2.88
    """Factor on the predicted time of a training step."""
