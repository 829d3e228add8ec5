"""The two compression methods, one object for each value of --dms-method.

DMS evicts a pair that is not kept. Its predecessor, Dynamic Memory Compression (DMC, arXiv 2403.09636),
merges that pair into the pair before it, and is here as a baseline. The two objects hold what differs between
the methods in training, in conversion and in the parity check. Code there asks `dms.compression_method` and
does not compare the method's name.

Three places know DMC by name. hf/ is copied into every export without this module, and refuses a model that
merges. inference/dmc_model.py is the model that merges. conversion/model_card.py has a card for each method.
The formulas of merging are in ops/merging.py.

Shapes: T tokens, B samples, G KV heads, D head size.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_dms.errors import CheckpointError
from megatron_dms.hf.configuration_dms import MERGING_REQUIRES

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_dms.config import DMSConfig


class CompressionMethod(ABC):
    """What becomes of a pair that is not kept, and what follows from it."""

    name: str
    """The value of --dms-method."""
    description: str
    """The subject of an error message."""
    required: Mapping[str, object] = {}
    """The values of other settings of DMSConfig for which alone the method is defined."""
    own_settings: tuple[str, ...] = ()
    """The fields of DMSConfig that only this method reads."""
    formats: tuple[str, ...]
    """The formats of HF checkpoints that can hold a model of this method (conversion/dms_formats.py)."""
    borrows_query: bool
    """Whether a channel of the queries is borrowed even if the predictor does not read it."""
    further_values: int
    """The number of raw values of each pair that travel to the core attention beside the decision's."""

    @abstractmethod
    def read_further_values(self, query_channel: "Tensor") -> list["Tensor"]:
        """Return the `further_values` raw values, [T, B, G] each.

        Args:
            query_channel: [T, B, G], the last channel of the first query head of each group.
        """

    @abstractmethod
    def pairs_to_attend(
        self, k: "Tensor", v: "Tensor", alpha: "Tensor", further: Sequence["Tensor"], dms: "DMSConfig"
    ) -> tuple["Tensor", "Tensor"]:
        """Return the keys and values that attention reads, [B, G, T, D] each.

        Args:
            k, v: [B, G, T, D], keys after RoPE.
            alpha: [B, G, T], the decisions.
            further: the raw values of `read_further_values`, [B, G, T] each.
        """

    @abstractmethod
    def exported_class(self, model_type: str) -> Any:
        """Return the class that runs an exported model of this `model_type` of transformers."""


class _Eviction(CompressionMethod):
    """DMS: a pair that is not kept is forgotten once it leaves the window."""

    name = "evict"
    description = "eviction (DMS)"
    formats = ("megatron_dms", "nvidia", "fastdms")
    borrows_query = False
    further_values = 0

    def read_further_values(self, query_channel: "Tensor") -> list["Tensor"]:
        return []

    def pairs_to_attend(
        self, k: "Tensor", v: "Tensor", alpha: "Tensor", further: Sequence["Tensor"], dms: "DMSConfig"
    ) -> tuple["Tensor", "Tensor"]:
        return k, v

    def exported_class(self, model_type: str) -> Any:
        from megatron_dms.hf import MODEL_CLASSES, modeling_dms

        return getattr(modeling_dms, MODEL_CLASSES[model_type])


class _Merging(CompressionMethod):
    """DMC: a pair that is not kept joins the mean of the pairs before it, weighted by its importance.

    The borrowed channel of the query is the raw value of a pair's importance, and the borrowed channel of the
    key is the raw value of its decision.
    """

    name = "merge"
    description = "merging (DMC)"
    required = MERGING_REQUIRES
    own_settings = ("importance_scale", "importance_offset")
    formats = ("megatron_dms",)
    borrows_query = True
    further_values = 1

    def read_further_values(self, query_channel: "Tensor") -> list["Tensor"]:
        return [query_channel]

    def pairs_to_attend(
        self, k: "Tensor", v: "Tensor", alpha: "Tensor", further: Sequence["Tensor"], dms: "DMSConfig"
    ) -> tuple["Tensor", "Tensor"]:
        import torch.nn.functional as F

        from megatron_dms.ops.merging import merge_pairs

        (importance,) = further
        log_importance = F.logsigmoid(dms.importance_scale * importance.float() - dms.importance_offset)
        return merge_pairs(k, v, alpha, log_importance)

    def exported_class(self, model_type: str) -> Any:
        from megatron_dms.inference.dmc_model import merging_class

        return merging_class(model_type)


EVICTION, MERGING = _Eviction(), _Merging()
METHODS: dict[str, CompressionMethod] = {method.name: method for method in (EVICTION, MERGING)}


def method_of(fields: Mapping[str, object]) -> CompressionMethod:
    """Return the method of a checkpoint's `args.dms`; without the field `method` the model evicts pairs.

    Raises:
        CheckpointError: there is no such method.
    """
    name = str(fields.get("method", EVICTION.name))
    if name not in METHODS:
        raise CheckpointError(
            f"the checkpoint's args.dms says method {name!r}, expected one of {', '.join(METHODS)}"
        )
    return METHODS[name]
