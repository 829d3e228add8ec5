"""The numbers of the hardware, and the assumptions about how much of them a run reaches."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One accelerator, from its data sheet.

    flops: dense bf16 FLOPs with fp32 accumulation in a second. memory: bytes. bandwidth: bytes/s of the
    memory. node_link, network: bytes/s of one device in one direction, within its node and beyond it.
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
"""SXM modules. The network is one port of 400 Gb/s (A100: 200 Gb/s) for each device. A few percent more
memory can be allocated than the data sheet says."""


@dataclass(frozen=True)
class Assumptions:
    """Shares of the data sheet that a run reaches, and what it does not hide behind other work.

    All numbers but the last are round numbers near what large products, FlashAttention-2 kernels, streaming
    kernels and NCCL reach on an H100 in public reports; they are not adapted to any comparison. `slowdown` is
    the only fitted number. It serves all runs and is the geometric mean of published over predicted time
    (calibration.py). Nothing here was measured with this project, which has not trained on a GPU.
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
    """Share of gradient reduction and parameter gathering that a step waits for. 1: Megatron without
    --overlap-grad-reduce and --overlap-param-gather. A step always waits for TP, CP and PP messages."""
    overhead: float = 4e9
    """Bytes of a device outside all categories: CUDA context, buffers of NCCL, workspaces, fragmentation."""
    slowdown: float = 2.88
    """Factor on the predicted time of a training step."""
