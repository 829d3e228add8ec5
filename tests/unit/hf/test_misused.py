"""What a user does with an export beside plain generation: each works, or ends with the cause."""

import pytest
import torch
from torch import Tensor

from tests.support.exported_models import export
from tests.support.tiny_dms_models import HEAD_SIZE, KV_HEADS, LAYERS, random_tokens, tiny_model


@pytest.mark.parametrize("given", [False, True], ids=["by generate", "by the caller"])
def test_a_cache_under_gradient_checkpointing(given: bool) -> None:
    """Catches: "out of memory?" at the second token, because transformers took the layers' cache away."""
    model, tokens = tiny_model().train(), random_tokens(2, 13)
    model.gradient_checkpointing_enable()
    cache = {"past_key_values": model.make_cache()} if given else {}
    with pytest.raises(ValueError, match=r"call model.eval\(\), or pass use_cache=False"):
        model.generate(tokens, do_sample=False, max_new_tokens=4, **cache)
    assert model.generate(tokens, use_cache=False, do_sample=False, max_new_tokens=4).shape == (2, 17)
    expected = model.eval().generate(tokens, use_cache=False, do_sample=False, max_new_tokens=4)
    assert torch.equal(model.generate(tokens, do_sample=False, max_new_tokens=4), expected)


@pytest.mark.parametrize("begun", [False, True], ids=["begun without", "begun with"])
def test_autocast_stays_as_it_was(begun: bool) -> None:
    """Catches: torch's index_copy_ error in the middle of a forward, and a cache lost by the refusal."""
    model, tokens = tiny_model(), random_tokens(2, 13)
    cache = model.make_cache()

    def step(tokens: Tensor, autocast: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(tokens, past_key_values=cache).logits

    step(tokens, begun)
    with pytest.raises(ValueError, match="one cache, one type; keep autocast as it was"):
        step(tokens[:, :1], not begun)
    step(tokens[:, :1], begun)
    assert cache.get_seq_length() == 14


def test_bytes_under_autocast() -> None:
    """Keys are rotated in fp32, values stay bf16. Catches: both counted at the keys' size."""
    model = tiny_model()
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(random_tokens(2, 13), do_sample=False, max_new_tokens=5)
    stats = model.last_kv_stats
    assert stats.dense_bytes == sum(stats.tokens_seen) * LAYERS * KV_HEADS * HEAD_SIZE * (4 + 2)


def test_a_compiled_forward() -> None:
    """Catches: sizes in bytes that torch.compile cannot trace once the cache has grown."""
    model, tokens = tiny_model(), random_tokens(2, 13)
    expected = model.generate(tokens, do_sample=False, max_new_tokens=7)
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    assert torch.equal(model.generate(tokens, do_sample=False, max_new_tokens=7), expected)


@pytest.mark.parametrize("predictor", ["linear", "query_channel"])
def test_every_trainable_weight_gets_a_gradient(predictor: str, tmp_path) -> None:
    """Catches: data-parallel training that waits for the gradient of hard decisions."""
    from transformers import AutoModelForCausalLM

    export(tiny_model("llama", predictor=predictor), tmp_path)
    for model in (
        tiny_model("llama", predictor=predictor),
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True),
    ):
        model.train()(random_tokens(2, 9)).logits.sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        assert all(".dms_proj_alpha" in name for name in frozen)
        assert bool(frozen) == (predictor == "linear")


@pytest.mark.parametrize(
    "name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"]
)
def test_continuous_batching_is_refused(name: str) -> None:
    """Catches: a request that is accepted, and whose error stands in a thread's log."""
    with pytest.raises(NotImplementedError, match="continuous batching"):
        getattr(tiny_model(), name)([[1, 2]])


def test_a_cache_beside_that_of_generate() -> None:
    """Prefix tuning does this. Catches: transformers 5.24 dropping one of two caches in silence."""
    model, tokens = tiny_model(), random_tokens(2, 5)
    caches = {"cache": model.make_cache(), "past_key_values": model.make_cache()}
    with pytest.raises(ValueError, match="two names of one argument, and both are given"):
        model(tokens, **caches)
    assert model.make_cache().layers[0].max_cache_len == -1
