"""Attention back-ends against causal attention without DMS and against FlexAttention, in one process.

Inputs are random. Decisions are drawn at a compression ratio, or they are those that an exported checkpoint
makes over a text.

Shapes: B samples, H query heads, G KV heads, T tokens, D head size, L layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megatron_dms.benchmarks.measuring import (
    Candidate,
    Measured,
    Result,
    compare,
    device_name,
    dtype_name,
    ratio,
)
from megatron_dms.kernels import BACKENDS, attention_backend
from megatron_dms.ops.eviction import shift

KEPT, EVICTED = -1e-3, -200.0
"""log(1 - alpha) of drawn decisions: near 0, and so far below every threshold that no weight is denormal,
which is slow on a CPU."""
BACKWARD = 2.5
"""Matrix products of a backward pass for each one of the forward pass."""
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
TRIALS = 3
"""Rounds in which the fastest back-end of SDPA is found."""
CHUNK = 1024
"""Tokens of a text that a checkpoint reads at a time."""


class Shape(NamedTuple):
    """Sizes of the inputs (B, H, G and D as above), and the window in tokens."""

    B: int
    H: int
    G: int
    D: int
    window: int


class Decisions(NamedTuple):
    """The decisions that one row of the table is about."""

    name: str
    layers: list[Tensor]
    """log_keep of each layer, [B, G, T] fp32, already shifted. The time of a row is the mean over layers."""

    @property
    def cr(self) -> float:
        """Compression ratio: pairs for each pair that is kept."""
        return 1 / torch.stack([(x > EVICTED / 2).double().mean() for x in self.layers]).mean().item()


@dataclass(frozen=True, kw_only=True)
class AttentionResult(Result):
    """Time of the attention of one layer."""

    B: int
    H: int
    G: int
    D: int
    T: int
    window: int
    attention: str
    """A back-end of DMS, or "causal (X)" without DMS, where X is the fastest back-end of SDPA."""
    decisions: str | None
    cr: float | None
    """Compression ratio of these decisions."""
    step: str
    """forward, or forward + backward."""
    tflops: float | None
    """TFLOP/s, counted on the whole causal triangle even if a back-end skips parts of it."""
    to_causal: float | None
    """Time divided by that of causal attention."""
    to_flex: float | None
    """Time divided by that of FlexAttention with the same decisions."""


def drawn(cr: float, shape: Shape, T: int, device: torch.device) -> Decisions:
    """Draw decisions by which each KV head keeps T / cr keys, anywhere; each call draws the same ones.

    Raises:
        ValueError: cr is not between 1 and T.
    """
    if not 1 <= cr <= T:
        raise ValueError(f"CR is {cr:g}, expected between 1 and the context, {T}")
    rank = torch.rand(shape.B, shape.G, T, generator=torch.Generator().manual_seed(0)).argsort(-1)
    log_keep = torch.where(rank < round(T / cr), KEPT, EVICTED)
    return Decisions(f"drawn at CR {cr:g}", [log_keep.to(device)])


@torch.no_grad()
def of_checkpoint(
    folder: Path, text: Path, contexts: Sequence[int], device: torch.device
) -> tuple[Shape, dict[int, Decisions]]:
    """Return the shape of an exported checkpoint, and its hard decisions over the beginning of a text.

    Raises:
        ValueError: the folder is no such checkpoint, or the text has fewer tokens than the longest context.
    """
    from megatron_dms.hf.cache_dms import CACHE_NAME
    from megatron_dms.inference.loading import check_exported, load_model, load_tokenizer

    check_exported(folder)
    ids = load_tokenizer(folder)(text.read_text(encoding="utf-8"))["input_ids"]
    if len(ids) < max(contexts):
        raise ValueError(f"{text} has {len(ids)} tokens, but a context of {max(contexts)} is asked for")
    model = load_model(folder, "auto", str(device), "torch")
    heard: list[list[Tensor]] = []
    for layer in model.model.layers:
        heard.append([])
        attention = layer.self_attn
        attention.decide = partial(_overheard, attention.decide, heard[-1])
    cache = model.make_cache()
    for part in torch.tensor([ids[: max(contexts)]], device=device).split(CHUNK, dim=1):
        model(part, logits_to_keep=1, **{CACHE_NAME: cache})
    settings, config, head_size = model.dms_settings, model.config, model.model.layers[0].self_attn.head_dim
    evict = [torch.cat(parts, dim=-1) for parts in heard]  # of each layer [1, G, T]
    log_keep = [torch.zeros(x.shape, device=device).masked_fill_(x, float("-inf")) for x in evict]
    found = {T: Decisions(folder.name, [shift(x[..., :T], settings.lag) for x in log_keep]) for T in contexts}
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    return Shape(1, heads, groups, head_size, settings.window), found


def _overheard(decide: Callable[..., Tensor], heard: list[Tensor], *args: Tensor) -> Tensor:
    heard.append(decide(*args))
    return heard[-1]


def measure(
    shape: Shape,
    decisions: dict[int, list[Decisions]],
    backends: Sequence[str],
    dtype: torch.dtype,
    repeats: int,
    device: torch.device,
    say: Callable[[str], None],
) -> list[AttentionResult]:
    """Measure, at each context, causal attention and then each back-end with each of the decisions.

    Args:
        decisions: context in tokens -> the decisions at this context.

    Raises:
        ValueError: an unknown back-end, or numbers that do not go together.
    """
    unknown = sorted(set(backends) - set(BACKENDS))
    if unknown or not backends:
        raise ValueError(f"back-ends are {unknown or 'none'}, expected some of {', '.join(BACKENDS)}")
    if min(shape.B, shape.G, shape.D, repeats, *decisions) < 1 or shape.window < 0 or shape.H % shape.G:
        raise ValueError(
            "expected batch, KV heads, head size, contexts and repeats >= 1, a window >= 0 and query heads "
            f"a multiple of KV heads, found {shape}, contexts {list(decisions)}, repeats {repeats}"
        )
    rows: list[AttentionResult] = []
    for T, of_context in decisions.items():
        for step in ("forward", "forward + backward"):
            say(f"{step}, context {T} ...")
            rows += _rows(shape, T, of_context, backends, dtype, step, repeats, device)
    return rows


def _rows(
    shape: Shape,
    T: int,
    decisions: list[Decisions],
    backends: Sequence[str],
    dtype: torch.dtype,
    step: str,
    repeats: int,
    device: torch.device,
) -> list[AttentionResult]:
    torch.compiler.reset()  # torch compiles eight variants of FlexAttention, and runs further ones uncompiled
    B, H, G, D, window = shape
    q, k, v, grad = (torch.randn(B, heads, T, D, dtype=dtype, device=device) for heads in (H, G, G, H))
    backward = step != "forward"
    for x in (q, k, v):
        x.requires_grad_(backward)

    def run(attend: Callable[..., Tensor], *biases: Tensor) -> None:
        inputs = (q, k, v, *(x.detach().requires_grad_(backward) for x in biases))
        out = attend(*inputs)
        if backward:
            torch.autograd.grad(out, inputs, grad)

    def by_layers(name: str, layers: list[Tensor]) -> None:
        attend = attention_backend(name)  # a back-end that cannot be imported is not measured
        for log_keep in layers:
            run(lambda *inputs: attend(*inputs, window), log_keep)

    causal = {name: Candidate(partial(run, partial(_causal, SDPA[name]))) for name in SDPA}
    trial = compare(causal, TRIALS, device)
    fastest = min(SDPA, key=lambda name: trial[name].ms or float("inf"))
    candidates: dict[Any, Candidate] = {"causal": causal[fastest]}
    for asked in decisions:
        for name in backends:
            candidates[name, asked.name] = Candidate(partial(by_layers, name, asked.layers))
    found = compare(candidates, repeats, device)
    for asked in decisions:
        for name in backends:
            found[name, asked.name] = found[name, asked.name].per(len(asked.layers))

    products = 2 * B * H * D * T**2 * (1 + backward * BACKWARD)

    def row(attention: str, own: Measured, asked: Decisions | None) -> AttentionResult:
        return AttentionResult(
            *astuple(own),
            device=device_name(device),
            dtype=dtype_name(dtype),
            **shape._asdict(),
            T=T,
            attention=attention,
            decisions=asked.name if asked else None,
            cr=asked.cr if asked else None,
            step=step,
            tflops=None if own.ms is None else products / own.ms / 1e9,
            to_causal=ratio(own, found["causal"]),
            to_flex=ratio(own, found.get(("flex", asked.name))) if asked else None,
        )

    rows = [row(f"causal ({fastest})", found["causal"], None)]
    return rows + [row(name, found[name, asked.name], asked) for asked in decisions for name in backends]


def _causal(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
