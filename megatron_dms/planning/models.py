"""The sizes of models, as presets or from a config.json, and their numbers of parameters."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PAD_VOCABULARY_TO = 128
"""Default of Megatron's --make-vocab-size-divisible-by; it pads to a multiple of this number times TP."""


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a dense decoder with RMSNorm, grouped queries and gated SiLU.

    context, batch: tokens and samples with which the authors of DMS trained the model; None if they did not.
    """

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_size: int
    vocab: int
    positions: int
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    context: int | None = None
    batch: int | None = None

    @property
    def q(self) -> int:
        """Channels of all query heads together."""
        return self.heads * self.head_size

    @property
    def kv(self) -> int:
        """Channels of all keys, or of all values."""
        return self.groups * self.head_size

    @property
    def layer_matmul(self) -> int:
        """Number of elements in the matrices of one layer."""
        return self.hidden * (2 * self.q + 2 * self.kv + 3 * self.ffn)

    @property
    def pair_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers and KV heads, in a 2-byte type."""
        return 2 * 2 * self.layers * self.kv

    def padded_vocab(self, tp: int) -> int:
        """Return the number of rows that the embedding has in Megatron at this tensor-parallel size."""
        multiple = PAD_VOCABULARY_TO * tp
        return -(-self.vocab // multiple) * multiple

    def layer_parameters(self, tp: int = 1) -> int:
        """Return the parameters of one layer on one tensor-parallel rank, without a predictor.

        Matrices and biases are divided among the ranks, norms are not.
        """
        divided = self.layer_matmul + (self.q + 2 * self.kv if self.qkv_bias else 0)
        return divided // tp + 2 * self.hidden + (2 * self.head_size if self.qk_norm else 0)

    def predictor_parameters(self, tp: int = 1) -> int:
        """Return the parameters of one layer's linear predictor on one tensor-parallel rank.

        These are G x hidden + hidden (mcore/predictor.py), and a bias if the model's attention has biases. A
        borrowed channel has no parameters.
        """
        divided = self.groups * self.hidden + (self.groups if self.qkv_bias else 0)
        return divided // tp + self.hidden

    def parameters(self) -> int:
        """Return the parameters of the whole checkpoint, without padding and predictor."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * self.layer_parameters() + embeddings + self.hidden

    def stage_parameters(self, tp: int, pp: int, stage: int, predictor: bool = False) -> int:
        """Return the parameters on one rank of a pipeline stage (0 = first) in Megatron.

        The first stage holds the embedding, the last stage the final norm and the output layer. If embedding
        and output layer are tied and the stages differ, the last stage holds a copy of the embedding.
        """
        table = self.padded_vocab(tp) * self.hidden // tp
        layer = self.layer_parameters(tp) + (self.predictor_parameters(tp) if predictor else 0)
        count = self.layers // pp * layer
        if stage == 0:
            count += table
        if stage == pp - 1:
            count += self.hidden + (0 if self.tied and pp == 1 else table)
        return count


def _qwen(name: str, layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab: int) -> ModelSize:
    """Return the sizes of a Qwen model that the paper trained."""
    sizes = (layers, hidden, ffn, heads, groups, 128, vocab, 131072)
    return ModelSize(name, *sizes, qkv_bias=True, context=8192, batch=1024)


PRESETS: Mapping[str, ModelSize] = {
    size.name: size
    for size in (
        ModelSize(
            "llama-3.2-1b", 16, 2048, 8192, 32, 8, 64, 128256, 131072, tied=True, context=4096, batch=1024
        ),
        ModelSize("llama-2-7b", 32, 4096, 11008, 32, 32, 128, 32000, 4096, context=4096, batch=1024),
        ModelSize("llama-3.1-8b", 32, 4096, 14336, 32, 8, 128, 128256, 131072, context=8192, batch=1024),
        _qwen("qwen-r1-1.5b", 28, 1536, 8960, 12, 2, 151936),
        _qwen("qwen-r1-7b", 28, 3584, 18944, 28, 4, 152064),
        _qwen("qwen-r1-32b", 64, 5120, 27648, 40, 8, 152064),
        ModelSize(
            "qwen3-8b", 36, 4096, 12288, 32, 8, 128, 151936, 40960, qk_norm=True, context=32768, batch=256
        ),
    )
}
"""Sizes of the public config.json files; context and batch are the paper's settings (arXiv 2506.05345)."""
QWEN3_SMALL = ModelSize("qwen3-0.6b", 28, 1024, 3072, 16, 8, 128, 151936, 131072, tied=True, qk_norm=True)
TOY = ModelSize("tiny", 2, 64, 96, 4, 2, 16, 131, 131072, tied=True)
"""Sizes of models that are measured (benchmarks/synthetic_models.py) and are no presets."""


def preset(name: str) -> ModelSize:
    """Return the sizes of a preset; raise ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"model is {name!r}, expected one of {', '.join(PRESETS)}, or --hf DIR")
    return PRESETS[name]


def of_folder(folder: Path) -> ModelSize:
    """Return the sizes in an HF folder's config.json, read and checked as in a conversion (imports torch).

    Raises:
        ValueError: the file cannot be read, or this project does not know the model; one line.
    """
    from megatron_dms.conversion.families import read_model

    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; expected a HF folder") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {type(config).__name__}, expected an object")
    found = read_model(config)
    return ModelSize(
        folder.resolve().name,
        found.layers,
        found.hidden,
        found.ffn,
        found.heads,
        found.groups,
        found.head_size,
        found.vocab,
        found.positions,
        tied=found.tied,
        qkv_bias=found.family.qkv_bias,
        qk_norm=found.family.qk_norm,
    )
