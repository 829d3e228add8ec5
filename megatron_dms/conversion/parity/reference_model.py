"""Run transformers' model of an HF checkpoint, in fp32 on the CPU.

The class is transformers' own for the model type, or for a DMS model that of megatron_dms/hf, whose settings
come from the checked Model: formats that keep them elsewhere than in config.json are served too. Code that a
checkpoint brings along is never executed: no Auto class and no auto_map is asked.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_dms.compression_method import method_of
from megatron_dms.conversion import dms_formats
from megatron_dms.conversion.families import Model
from megatron_dms.conversion.hf_folder import HFFolder
from megatron_dms.conversion.parity.outputs import LOGIT_TOLERANCE, Outputs
from megatron_dms.conversion.parity.prompts import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from megatron_dms.hf.attention_dms import DMSAttention


def reference_outputs(folder: HFFolder, model: Model, sets: list[Prompts]) -> list[Outputs]:
    """Return the outputs for each set of prompts; the network is built, used and released."""
    network = _load(folder, model)
    decisions = None if model.dms is None else _Decisions.record(network)
    with torch.no_grad():
        return [_run(network, prompts, decisions) for prompts in sets]


def _load(folder: HFFolder, model: Model) -> "PreTrainedModel":
    import transformers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config_class = transformers.CONFIG_MAPPING[model.family.model_type]
    entries: dict[str, object] = {}
    network_class: type[PreTrainedModel]
    if model.dms is None:
        # The library's annotation says a pair of classes; a look-up by one config class gives one class.
        network_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[config_class]  # type: ignore[assignment]
    else:
        entries = dms_formats.config_entries(model.dms, model.family.model_type)
        network_class = method_of(model.dms.stored()).exported_class(model.family.model_type)
    network = network_class.from_pretrained(
        folder.path,
        config=config_class.from_dict({**folder.config, **model.corrections(folder.config), **entries}),
        dtype=torch.float32,
        attn_implementation="eager",
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
    )
    return network.eval()


def _run(network: "PreTrainedModel", prompts: Prompts, decisions: "_Decisions | None") -> Outputs:
    inputs: dict[str, Tensor] = {}
    if not prompts.contiguous:
        # The mask in full, or transformers would take the gaps for the borders of packed texts.
        length = len(prompts.positions)
        hidden = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
        inputs["attention_mask"] = hidden.expand(prompts.count, 1, -1, -1)
        inputs["position_ids"] = prompts.positions_BT()
    logits = network(prompts.tokens_BT(), use_cache=False, **inputs).logits
    return Outputs(logits) if decisions is None else decisions.attach(logits)


@dataclass
class _Decisions:
    """A record of what each DMS attention layer of a network decides."""

    evict_BGT: list[Tensor] = field(default_factory=list)
    near_zero_BGT: list[Tensor] = field(default_factory=list)

    @classmethod
    def record(cls, network: "PreTrainedModel") -> "_Decisions":
        decisions = cls()
        for layer in network.model.layers:
            layer.self_attn.decide = partial(decisions._decide, layer.self_attn, layer.self_attn.decide)
        return decisions

    def _decide(self, attention: "DMSAttention", decide: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        settings = attention.settings
        margin = LOGIT_TOLERANCE * settings.alpha_scale
        bounds = []
        for offset in (settings.alpha_offset - margin, settings.alpha_offset + margin):
            attention.settings = replace(settings, alpha_offset=offset)
            bounds.append(decide(*inputs))
        attention.settings = settings
        decided = decide(*inputs)
        self.evict_BGT.append(decided.clone())
        self.near_zero_BGT.append(bounds[0] ^ bounds[1])
        return decided

    def attach(self, logits: Tensor) -> Outputs:
        """Return the outputs of the last forward, and empty the record."""
        outputs = Outputs(logits, torch.stack(self.evict_BGT), torch.stack(self.near_zero_BGT))
        self.evict_BGT, self.near_zero_BGT = [], []
        return outputs
