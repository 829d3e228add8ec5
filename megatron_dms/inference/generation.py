"""Answer several prompts at once with an exported or a plain model on the paged cache.

Shapes: B prompts, W chains of each, T generated tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; temperature 0 takes the likeliest token."""

    temperature: float = 1.0
    top_p: float = 1.0

    @property
    def keywords(self) -> dict[str, Any]:
        """The keyword arguments for `generate`."""
        if self.temperature == 0:
            return {"do_sample": False}
        every = {"top_k": 0}  # transformers' default is 50
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, **every}


def check_prompts(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Check that the model can take the prompts.

    Raises:
        ValueError: a prompt with its answer is longer than the model's positions, or a prompt has a token
            that the model does not have.
    """
    longest = max(map(len, prompts)) + max_new_tokens - 1  # the last token is never fed
    positions = getattr(model, "max_positions", longest)  # exports of earlier versions lack it
    if longest > positions:
        raise ValueError(
            f"the longest prompt and its answer make {longest} tokens, the model has {positions} positions: "
            "ask for fewer new tokens"
        )
    largest, rows = max(map(max, prompts)), model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise ValueError(
            f"the tokenizer gives token {largest}, the model has {rows}: they do not go together"
        )


def pad_id(tokenizer: Any) -> int:
    """The token for padding. Padding is masked, so any token will do if the tokenizer names none."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def end_texts_only(model: Any) -> None:
    """Keep only the end-of-sequence tokens of the checkpoint's own generation settings."""
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)


def answer_prompts(
    model: Any,
    prompts: Sequence[Sequence[int]],
    chains: int,
    max_new_tokens: int,
    sampling: Sampling,
    pad_id: int,
) -> Tensor:
    """Generate `chains` answers to each prompt.

    Returns:
        [B * W, T] token ids, the chains of a prompt one after another, with `pad_id` after the end of a text.

    Raises:
        ValueError: the memory does not suffice.
    """
    width = max(map(len, prompts))
    device = model.get_input_embeddings().weight.device
    ids_BT = [[pad_id] * (width - len(ids)) + list(ids) for ids in prompts]
    mask_BT = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    try:
        said = model.generate(
            input_ids=torch.tensor(ids_BT, device=device),
            attention_mask=torch.tensor(mask_BT, device=device),
            max_new_tokens=max_new_tokens,
            num_return_sequences=chains,
            use_cache=True,
            pad_token_id=pad_id,
            **sampling.keywords,
        )
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"out of memory: a smaller --batch-size or fewer chains need less ({error})"
        ) from error
    return said[:, width:]
