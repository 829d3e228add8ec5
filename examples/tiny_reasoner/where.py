"""Measure where a DMS model spends its cache: the share of pairs kept, by layer, KV head and position.

Shapes: L layers, G KV heads, T tokens of the longest text.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def kept_fractions(folder: Path, problems: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Measure an exported model on solved problems: prompt, right chain of thought and right answer.

    Returns:
        "heads": [L][G], the share kept of all decided pairs; "positions": [L * G][T], the share kept at each
        position, up to the length of the longest text; "prompt": mean length of the prompts in tokens.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    lag = model.dms_settings.lag
    found: list[torch.Tensor] = []  # decisions of one forward, in the order of the layers

    def decide_and_note(decide: Any) -> Any:
        def noting(*tensors: Any) -> torch.Tensor:
            found.append(decide(*tensors))
            return found[-1]

        return noting

    for layer in model.model.layers:
        layer.self_attn.decide = decide_and_note(layer.self_attn.decide)
    layers, groups = len(model.model.layers), model.config.num_key_value_heads
    longest = model.config.max_position_embeddings
    kept_LGT, count_T, prompt_tokens = torch.zeros(layers, groups, longest), torch.zeros(longest), 0
    for problem in problems:
        ids = tokenizer.apply_chat_template(problem["messages"], return_dict=True)["input_ids"]
        asked = problem["messages"][:-1]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)
        prompt_tokens += len(prompt["input_ids"])
        found.clear()
        model(torch.tensor([ids]), use_cache=False)
        # Token j + lag decides on pair j.
        keep_LGT = ~torch.stack([evict_BGT[0] for evict_BGT in found])[..., lag:]
        kept_LGT[..., : keep_LGT.shape[-1]] += keep_LGT
        count_T[: keep_LGT.shape[-1]] += 1
    T = int((count_T > 0).sum())
    positions = (kept_LGT[..., :T] / count_T[:T]).flatten(0, 1)
    return {
        "heads": (kept_LGT.sum(dim=2) / count_T.sum()).tolist(),
        "positions": [[round(value, 4) for value in row] for row in positions.tolist()],
        "prompt": prompt_tokens / len(problems),
    }
