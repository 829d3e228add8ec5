"""Decode steps captured in a CUDA graph, against plain steps. Tests that need no GPU are in test_graph.py."""

import pytest
import torch

from megatron_dms.hf import graph_dms, pages_dms
from megatron_dms.hf.graph_dms import GraphedStep
from tests.support.tiny_dms_models import random_tokens, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

STEPS, PROMPT = 200, 21


def prompted(attend_with, dtype):
    """Return a model on the GPU, a cache with two prompts (one of them padded on the left), and the next
    tokens."""
    model = tiny_model("llama", predictor="linear", head_dim=64, max_position_embeddings=512)
    model = model.to("cuda", dtype)
    model.page_attention = attend_with
    mask_BT = torch.ones(2, PROMPT, dtype=torch.int64)
    mask_BT[1, :8] = 0
    inputs = {
        "input_ids": random_tokens(2, PROMPT),
        "attention_mask": mask_BT,
        "position_ids": (mask_BT.cumsum(dim=1) - 1).clamp(min=0),
    }
    cache = model.make_cache()
    logits = model(**{name: part.cuda() for name, part in inputs.items()}, past_key_values=cache).logits
    return model, cache, logits[:, -1].argmax(dim=-1, keepdim=True)


@pytest.mark.parametrize(
    ("attend_with", "dtype"),
    [("torch", torch.float64), ("triton", torch.float32), ("triton", torch.bfloat16)],
)
@torch.no_grad()
def test_graphed_steps_are_plain_steps(attend_with, dtype, monkeypatch):
    """Catches a launch with a number of the host's in it, a kernel that reads what the capture's own memory
    pool has given to another, and a graph of pages that have moved. ("torch" adds up in any order on CUDA, so
    it runs in fp64, where that decides about no token.)"""
    monkeypatch.setattr(graph_dms, "STEPS_AHEAD", 40)
    monkeypatch.setattr(pages_dms, "PAGE_SIZE", 16)
    tokens, stats, captures = {}, {}, []
    for graphed in (True, False):
        model, cache, token_B1 = prompted(attend_with, dtype)
        step = GraphedStep(model, cache)
        capture = step._capture
        monkeypatch.setattr(step, "_capture", lambda run=capture: captures.append(1) or run())
        chosen = []
        for _ in range(STEPS):
            if graphed:
                logits_BV = step(token_B1)
            else:
                cache.make_room(graph_dms.STEPS_AHEAD)
                out = model(token_B1, position_ids=cache.seen_B[:, None], past_key_values=cache)
                logits_BV = out.logits[:, -1]
            cache.meter.count_generated(None)
            token_B1 = logits_BV.argmax(dim=-1, keepdim=True)
            chosen.append(token_B1)
        tokens[graphed], stats[graphed] = torch.cat(chosen, dim=1), cache.meter.stats()
    print(f"{len(captures)} captures in {STEPS} steps, CR {stats[True].achieved_cr:.2f}")
    assert torch.equal(tokens[True], tokens[False])
    assert stats[True] == stats[False]
    assert len(captures) > 1 and stats[True].achieved_cr > 1.3


@pytest.mark.parametrize("attend_with", ["torch", "triton"])
@torch.no_grad()
def test_a_replay_waits_for_nothing(attend_with):
    """Catches a number read from the device in a step, or an input copied from pageable memory."""
    model, cache, token_B1 = prompted(attend_with, torch.float32)
    step = GraphedStep(model, cache)
    for _ in range(2):  # the warm-up, the capture
        step(token_B1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            token_B1 = step(token_B1).argmax(dim=-1, keepdim=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cache.meter.stats().tokens_seen == [PROMPT + 5, PROMPT - 8 + 5]
