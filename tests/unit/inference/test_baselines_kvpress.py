"""Which tokens of a prompt TOVA, H2O and the window keep, against the scores of NVIDIA's kvpress 0.5.5.

kvpress needs transformers below 5.3, so it is installed for `make test-transformers-4` alone. Its presses
cut a prompt once. Where a press differs by design, the test undoes the difference and says so.
"""

import importlib.util
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from megatron_dms.inference.baselines.evicting import prompt_weights
from megatron_dms.inference.baselines.policies import H2O, TOVA, Window

found = importlib.util.find_spec("kvpress")
if found is None:
    pytest.skip("kvpress is not installed: see make test-transformers-4", allow_module_level=True)

B, H, G, T, D = 2, 6, 2, 17, 8


@pytest.fixture(scope="module")
def presses():
    """Import the presses without their package's __init__, which imports datasets and more for other
    presses."""
    package = types.ModuleType("kvpress")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["kvpress"] = package
    from kvpress.presses.observed_attention_press import ObservedAttentionPress
    from kvpress.presses.streaming_llm_press import StreamingLLMPress
    from kvpress.presses.tova_press import TOVAPress

    yield SimpleNamespace(tova=TOVAPress(), h2o=ObservedAttentionPress(), window=StreamingLLMPress)
    for name in [name for name in sys.modules if name.split(".")[0] == "kvpress"]:
        del sys.modules[name]


@pytest.fixture
def states():
    """Return queries, keys, and the weights as eager attention returns them, [B, H, T, T]."""
    generator = torch.Generator().manual_seed(0)
    q_BHTD = torch.randn(B, H, T, D, generator=generator).double()
    k_BGTD = torch.randn(B, G, T, D, generator=generator).double()
    score_BHTT = q_BHTD @ k_BGTD.repeat_interleave(H // G, dim=1).transpose(-1, -2) * D**-0.5
    future_TT = torch.ones(T, T, dtype=torch.bool).triu(1)
    return q_BHTD, k_BGTD, score_BHTT.masked_fill(future_TT, -torch.inf).softmax(-1)


def layer_after(policy, q_BHTD, k_BGTD):
    """Return the layer of `policy` after the prompt; 3 more tokens may follow."""
    from megatron_dms.hf.sparse_attention_dms import NewTokens
    from megatron_dms.inference.baselines.cache import LAYERS

    layer = LAYERS[type(policy)](policy, 3)
    new = NewTokens.place(torch.zeros(B, dtype=torch.int64), T, None)
    layer.take(q_BHTD, k_BGTD, k_BGTD, new, D**-0.5)
    return layer


def test_tova(presses, states):
    """Compares all tokens but the last one. kvpress puts a maximum in the place of the last token's own
    weight, so that the token always stays; here it may go, as in the paper."""
    q_BHTD, k_BGTD, weight_BHTT = states
    theirs_BGT = presses.tova.score(None, None, k_BGTD, None, weight_BHTT, {})
    layer = layer_after(TOVA(1.0), q_BHTD, k_BGTD)
    ours_BGT = layer.score_NC[:, :T].unflatten(0, (B, G))
    torch.testing.assert_close(ours_BGT[..., :-1], theirs_BGT[..., :-1])

    layer = layer_after(TOVA(20 / 7), q_BHTD, k_BGTD)  # k = 7
    kept_BG7 = layer.position_NC.sort().values.unflatten(0, (B, G))
    theirs_BG7 = theirs_BGT.topk(7).indices.sort().values
    last_is_kept = (kept_BG7 == T - 1).any(-1)
    assert last_is_kept.any(), "the seed is to have such a sequence"
    assert torch.equal(kept_BG7[last_is_kept], theirs_BG7[last_is_kept])


def test_h2o(presses, states):
    """Compares the sums after multiplying kvpress's back. kvpress divides the sum by the number of queries
    that could see the token, and leaves no token safe; the paper's code does not divide, and keeps the
    latest tokens safe."""
    q_BHTD, k_BGTD, weight_BHTT = states
    theirs_BGT = presses.h2o.score(None, None, k_BGTD, None, weight_BHTT, {}) * torch.arange(T, 0, -1)
    position_BT = torch.arange(T).expand(B, T)
    ours_BGT = prompt_weights(q_BHTD, k_BGTD, position_BT, position_BT, D**-0.5).sum(dim=2)
    torch.testing.assert_close(ours_BGT, theirs_BGT)

    layer = layer_after(H2O(20 / 7), q_BHTD, k_BGTD)  # k = 7: the latest 4, and 3 more
    kept_BG7 = layer.position_NC.sort().values.unflatten(0, (B, G))
    expected_BG3 = theirs_BGT[..., :-4].topk(3).indices.sort().values
    assert torch.equal(kept_BG7[..., :3], expected_BG3)
    assert torch.equal(kept_BG7[..., 3:], torch.arange(T - 4, T).expand(B, G, 4))
    torch.testing.assert_close(
        layer.score_NC.sort().values,
        theirs_BGT.gather(2, kept_BG7).flatten(0, 1).sort().values,
    )


def test_window(presses, states):
    """kvpress's ratio is the share of the prompt that goes: for k = 10 of 17 tokens it is 7 / 17."""
    q_BHTD, k_BGTD, _weight_BHTT = states
    press = presses.window(compression_ratio=(7 - 1e-6) / T)
    theirs_BGT = press.score(None, None, k_BGTD, None, None, {})
    layer = layer_after(Window(2.0), q_BHTD, k_BGTD)
    kept_NT = torch.zeros(B * G, T).scatter_(1, layer.position_NC, 1.0)
    assert torch.equal(kept_NT, theirs_BGT.flatten(0, 1).float()) and int(kept_NT[0].sum()) == 10
