"""The prompts on which the logits of two implementations are compared.

Tokens are random and fixed by a seed: they reach every row of the vocabulary, which text would not. A set is
described by numbers alone, so that every process makes the same tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dms.conversion.families import Model
from megatron_dms.errors import CheckpointError

_PROMPTS = 4
_SEED = 1234
_UNSCALED_ROPE = ("default", "dynamic")
"""Types that change nothing within the context for which a model is used."""
_LONGEST_DMS_PROMPT = 1024
"""In tokens: DMS prompts have no gaps, and their cost grows with the square of the length."""
_BEYOND = 64
"""Tokens beyond the original context, in a set made to pass it."""


@dataclass(frozen=True)
class Prompts:
    """One set of B prompts of T tokens, all at the same positions, which rise but may have gaps."""

    positions: tuple[int, ...]
    """Length T."""
    vocab: int
    count: int = _PROMPTS

    @property
    def contiguous(self) -> bool:
        """Whether the prompts stand at 0 .. T - 1, as any text does."""
        return self.positions == tuple(range(len(self.positions)))

    def tokens_BT(self) -> Tensor:
        generator = torch.Generator().manual_seed(_SEED)
        return torch.randint(self.vocab, (self.count, len(self.positions)), generator=generator)

    def positions_BT(self) -> Tensor:
        return torch.tensor(self.positions).expand(self.count, -1)


@dataclass(frozen=True)
class NotCompared:
    """Something that a reader may expect to have been compared, and why it was not."""

    what: str
    why: str


def original_context(model: Model) -> int | None:
    """Positions that the model was trained on before its RoPE was scaled; None where that is not known."""
    found = model.rope.get("original_max_position_embeddings")
    return None if found is None else int(found)


def choose_prompts(model: Model, prompt_tokens: int) -> tuple[list[Prompts], list[NotCompared]]:
    """Return the sets of prompts for a model, and what they leave out.

    Every model: contiguous prompts. Scaled RoPE: prompts spread over the whole scaled context, so that angles
    and distances beyond the original context are compared at the cost of a short prompt. A DMS model takes no
    gaps: its prompts are long enough to leave the window (and the original context) instead, if that is not
    too much.

    Raises CheckpointError if the length does not suit the model.
    """
    if not 0 < prompt_tokens <= model.positions:
        raise CheckpointError(
            f"--prompt-tokens is {prompt_tokens}, expected 1 to {model.positions} for this model"
        )
    if model.dms is not None:
        return _choose_without_gaps(model, model.dms.window, prompt_tokens)
    sets = [Prompts(tuple(range(prompt_tokens)), model.vocab)]
    if model.rope["rope_type"] not in _UNSCALED_ROPE:
        sets.append(Prompts(_spread(_scaled_context(model), max(prompt_tokens, 2)), model.vocab))
    return sets, []


def _choose_without_gaps(
    model: Model, window: int, prompt_tokens: int
) -> tuple[list[Prompts], list[NotCompared]]:
    left_out: list[NotCompared] = []
    lengths, longest = [prompt_tokens], min(_LONGEST_DMS_PROMPT, model.positions)
    if window + prompt_tokens <= longest:
        lengths = [window + prompt_tokens]
    else:
        left_out.append(
            NotCompared(
                "attention after an eviction",
                f"the window of {window} and {prompt_tokens} tokens beyond it are more than {longest}",
            )
        )
    original = original_context(model)
    if original is not None and original + _BEYOND > lengths[0]:
        if original + _BEYOND <= _LONGEST_DMS_PROMPT:
            lengths.append(original + _BEYOND)
        else:
            left_out.append(
                NotCompared(f"positions from {original} on", "DMS models take no gaps between positions")
            )
    return [Prompts(tuple(range(length)), model.vocab) for length in lengths], left_out


def _scaled_context(model: Model) -> int:
    """Return the number of positions that the scaling is for: max_position_embeddings, except in checkpoints
    where that is still the original context.
    """
    original = original_context(model)
    if original is not None and model.positions <= original:
        return int(original * float(model.rope["factor"]))
    return model.positions


def _spread(context: int, tokens: int) -> tuple[int, ...]:
    """Return `tokens` positions from 0 to context - 1, as evenly as whole numbers allow."""
    tokens = min(tokens, context)
    return tuple(round(index * (context - 1) / (tokens - 1)) for index in range(tokens))
