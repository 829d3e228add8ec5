"""GraphedStep without a GPU: the tensor operations of a step are recorded, and executed again as a graph
would."""

import copy

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_dms.hf import graph_dms, pages_dms
from megatron_dms.hf.graph_dms import GraphedStep
from tests.support.tiny_dms_models import random_tokens, tiny_model

PROMPT, PADDING = 11, (0, 3, 7)
SETTINGS = [("query_channel", 3, 1), ("linear", 7, 7), ("key_channel", 3, 0), ("key_channel", 0, 1)]


class Recording(TorchDispatchMode):
    """The aten calls under it. What a graph could not hold is an error: a call whose result depends on the
    device's numbers, and a tensor that came from the host in between."""

    ASK = {
        *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "lift_fresh", "_unique2"),
        *("unique_dim", "unique_consecutive", "bincount", "argwhere"),
    }

    def __init__(self, known):
        super().__init__()
        self.known = {part.untyped_storage().data_ptr() for part in known}
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        by_mask = name.startswith(("index", "_index")) and any(x.dtype == torch.bool for x in tensors[1:])
        if name in self.ASK or function is torch.ops.aten.repeat_interleave.Tensor or by_mask:
            raise AssertionError(f"{function} asks the device")
        if any(x.untyped_storage().data_ptr() not in self.known for x in tensors if x.numel()):
            raise AssertionError(f"{function} reads a tensor that was made on the host")
        out = function(*args, **kwargs)
        self.known |= {part.untyped_storage().data_ptr() for part in tree_leaves(out)}
        self.calls.append((function, args, kwargs, out))  # holds them: no address is used twice
        return out

    def replay(self):
        for function, args, kwargs, out in self.calls:
            returned = [result.alias_info for result in function._schema.returns]
            if returned and all(alias is not None and not alias.is_write for alias in returned):
                continue  # a view: its storage is filled by other calls
            again = function(*args, **kwargs)
            if any(alias is None for alias in returned):
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    old.copy_(new)


class NoHost(TorchFunctionMode):
    """Refuses operations that copy a tensor to the host without an aten call, on a CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert getattr(function, "__name__", "") not in ("tolist", "cpu", "numpy"), (
            f"{function} asks the device"
        )
        return function(*args, **(kwargs or {}))


class RecordedStep(GraphedStep):
    """Captures with Recording. Like a real capture, this changes nothing: only the replay does."""

    device_type = "cpu"
    warm_ups = captures = 0

    def _warm_up(self):
        self.warm_ups += 1
        return self._forward()

    def _capture(self):
        self.captures += 1
        state = self.cache.state
        before = [part.clone() for part in state]
        model = self.model
        recording = Recording([*state, self._ids_B1, *model.parameters(), *model.buffers()])
        with NoHost(), recording:
            self._logits_BV = self._forward()
        for part, old in zip(state, before, strict=True):
            part.copy_(old)
        return recording.replay


class Pair:
    """The same tokens through a RecordedStep and through plain steps, compared after each."""

    def __init__(self, model):
        self.model, self.cache = model, model.make_cache()
        model(**padded_prompt(), past_key_values=self.cache)
        self.plain = copy.deepcopy(self.cache)
        self.step = RecordedStep(model, self.cache)
        self.random = torch.Generator().manual_seed(3)

    def run(self, steps, ended=None):
        for _ in range(steps):
            ids_B1 = torch.randint(1, 64, (len(self.plain.seen_B), 1), generator=self.random)
            logits_BV = self.step(ids_B1)
            self.plain.make_room(graph_dms.STEPS_AHEAD)
            expected = self.model(ids_B1, position_ids=self.plain.seen_B[:, None], past_key_values=self.plain)
            assert torch.equal(logits_BV, expected.logits[:, -1])
            for cache in (self.cache, self.plain):
                cache.meter.count_generated(ended)
            self.compare()

    def compare(self):
        for mine, other in zip(self.cache.state, self.plain.state, strict=True):
            assert torch.equal(mine, other)
        assert self.cache.meter.stats() == self.plain.meter.stats()
        for mine, other in zip(self.cache.layers, self.plain.layers, strict=True):
            assert (mine.columns, mine.pool.sure_steps) == (other.columns, other.pool.sure_steps)
        self.cache.refuse_if_broken()


def padded_prompt():
    mask_BT = torch.ones(len(PADDING), PROMPT, dtype=torch.int64)
    for b, columns in enumerate(PADDING):
        mask_BT[b, :columns] = 0
    position_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    return {
        "input_ids": random_tokens(len(PADDING), PROMPT),
        "attention_mask": mask_BT,
        "position_ids": position_BT,
    }


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize(("predictor", "window", "lag"), SETTINGS)
@torch.no_grad()
def test_a_replayed_step_is_a_step(family, predictor, window, lag, monkeypatch):
    """Catches a tensor of the cache or its meter that is bound anew in a step, a position, length or page
    that the host gives as a number, and an aliased position. Three lengths; one sequence ends."""
    monkeypatch.setattr(pages_dms, "PAGE_SIZE", 4)
    pair = Pair(tiny_model(family, predictor=predictor, window=window, lag=lag))
    used = [int(layer.pool.used) for layer in pair.cache.layers]
    pair.run(window + 4)
    pair.run(window + 5, ended=torch.tensor([False, True, False]))
    assert (pair.step.warm_ups, pair.step.captures) == (1, 1)
    stats = pair.cache.meter.stats()
    assert stats.achieved_cr > 1.3 and len(set(stats.generated_tokens)) == 2
    assert all(int(layer.pool.used) > n for layer, n in zip(pair.cache.layers, used, strict=True))


@torch.no_grad()
def test_pools_that_grow_are_captured_anew(monkeypatch):
    """Catches a graph that goes on writing to pages that have moved, and steps counted twice or not at all by
    the host, whose count of free pages would then be wrong."""
    monkeypatch.setattr(pages_dms, "PAGE_SIZE", 2)
    monkeypatch.setattr(graph_dms, "STEPS_AHEAD", 5)
    pair = Pair(tiny_model())
    pair.run(60)
    print(f"{pair.step.warm_ups} warm-ups, {pair.step.captures} captures in 60 steps")
    assert 3 <= pair.step.warm_ups <= 12
    assert pair.step.captures in (pair.step.warm_ups, pair.step.warm_ups - 1)


@torch.no_grad()
def test_what_comes_between_steps():
    """Catches a graph that is replayed on a cache that has had a reorder, a chunk, a reset or plain steps."""
    model = tiny_model()
    pair = Pair(model)
    pair.run(4)
    for cache in (pair.cache, pair.plain):
        cache.reorder_cache(torch.tensor([2, 0, 0]))
    pair.run(4)
    more = random_tokens(3, 70, seed=9)  # more than fits into the pages
    for cache in (pair.cache, pair.plain):
        model(more, position_ids=cache.seen_B[:, None] + torch.arange(70), past_key_values=cache)
    pair.run(4)
    for cache in (pair.cache, pair.plain):
        cache.make_room(2)
        for _ in range(2):
            model(random_tokens(3, 1), position_ids=cache.seen_B[:, None], past_key_values=cache)
    pair.run(2)
    assert (pair.step.warm_ups, pair.step.captures) == (3, 3), "plain steps leave the graph as it is"
    for cache in (pair.cache, pair.plain):
        cache.reorder_cache(torch.tensor([1]))
    pair.run(4)
    for cache in (pair.cache, pair.plain):
        cache.reset()
        model(random_tokens(2, PROMPT), past_key_values=cache)
    pair.run(4)
    model(random_tokens(1, 5))
    pair.step(random_tokens(2, 1))
    assert model.last_kv_stats == pair.cache.meter.stats()


@torch.no_grad()
def test_steps_keep_their_addresses():
    """Catches a state tensor that is missing in DMSCache.state, so that nobody sees it move: all that the
    cache, its meter, layers and pools hold."""
    model = tiny_model()
    cache = model.make_cache()
    assert not cache.make_room(9), "empty, it has nothing to move"
    model(**padded_prompt(), past_key_values=cache)
    listed = {id(part) for part in cache.state}
    for owner in (cache, cache.meter, *cache.layers, *(layer.pool for layer in cache.layers)):
        for name, value in vars(owner).items():
            assert not isinstance(value, torch.Tensor) or id(value) in listed, name
    assert len(listed) == len(cache.state)
    cache.make_room(9)
    before = [(id(part), part.data_ptr()) for part in cache.state]
    for _ in range(9):
        model(random_tokens(3, 1), position_ids=cache.seen_B[:, None], past_key_values=cache)
        cache.meter.count_generated(None)
    cache.meter.restart_sequences()
    assert [(id(part), part.data_ptr()) for part in cache.state] == before


@torch.no_grad()
def test_positions_may_be_those_of_the_cache():
    """Catches seen_B handed out as the tensor that the forward counts up: RoPE would turn one too far."""
    model, ids_BT = tiny_model(), random_tokens(2, PROMPT + 3)
    cache = model.make_cache()
    model(ids_BT[:, :PROMPT], past_key_values=cache)
    expected = model(ids_BT, use_cache=False).logits
    for t in range(PROMPT, PROMPT + 3):
        out = model(ids_BT[:, t : t + 1], position_ids=cache.seen_B[:, None], past_key_values=cache)
        assert torch.allclose(out.logits[:, 0], expected[:, t], atol=1e-4)


@torch.no_grad()
def test_growth_that_breaks_off_is_refused(monkeypatch):
    """Catches keys and values of different sizes used on, after make_room ran out of memory."""
    monkeypatch.setattr(pages_dms, "PAGE_SIZE", 2)
    pair = Pair(tiny_model(dms_disable_eviction=True))
    real, calls = pages_dms.allocate, []

    def exhausted(pages, like):
        calls.append(pages)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. (simulated)")
        return real(pages, like)

    monkeypatch.setattr(pages_dms, "allocate", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        for _ in range(30):
            pair.step(random_tokens(3, 1))
    with pytest.raises(RuntimeError, match="unusable"):
        pair.step(random_tokens(3, 1))


@torch.no_grad()
def test_the_last_positions_are_stepped_plainly():
    """Catches a graph replayed beyond the positions the model has: nothing in it would refuse."""
    model = tiny_model(max_position_embeddings=PROMPT + 6)
    pair = Pair(model)
    pair.run(6)
    with pytest.raises(ValueError, match="positions"):
        pair.step(random_tokens(3, 1))


def test_refusals():
    """Catches what a graph would get wrong in silence, or what would fail with a CUDA error."""
    model = tiny_model()
    with pytest.raises(ValueError, match="model is on cpu; a graph needs one cuda device"):
        GraphedStep(model, model.make_cache())
    cache = model.make_cache()
    with pytest.raises(ValueError, match="no DMS cache with a prompt"):
        RecordedStep(model, cache)
    with pytest.raises(ValueError, match="NoneType is no DMS cache"):
        RecordedStep(model, None)
    model(random_tokens(2, PROMPT), past_key_values=cache)
    with pytest.raises(ValueError, match="window, lag"):
        RecordedStep(tiny_model(window=4), cache)
    step = RecordedStep(model, cache)
    with pytest.raises(ValueError, match=r"\[1, 1\], expected one token per sequence, \[2, 1\]"):
        step(random_tokens(1, 1))
    with pytest.raises(ValueError, match="autocast"), torch.autocast("cpu", torch.bfloat16):
        step(random_tokens(2, 1))
    with pytest.raises(ValueError, match="training mode"):
        RecordedStep(tiny_model().train(), cache)
    forked = model.make_cache()
    forked.copies = 2
    model(random_tokens(1, PROMPT).repeat(2, 1), past_key_values=forked)
    with pytest.raises(ValueError, match=r"stands for 2 .* call cache.fork\(\) first"):
        RecordedStep(model, forked)
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    model = tiny_model(rope_scaling=dynamic)
    with pytest.raises(ValueError, match="RoPE"):
        RecordedStep(model, cache)


@torch.no_grad()
def test_a_capture_that_breaks_off_is_refused(monkeypatch):
    """Catches: counters of the host that are a step ahead of the device's, in a cache that seems usable."""
    model, ids_BT = tiny_model(), random_tokens(1, PROMPT)
    cache = model.make_cache()
    model(ids_BT, past_key_values=cache, use_cache=True)
    step = RecordedStep(model, cache)
    step(random_tokens(1, 1))  # warms up

    def capture():
        step._forward()
        raise RuntimeError("capture failed")

    monkeypatch.setattr(step, "_capture", capture)
    with pytest.raises(RuntimeError, match="capture failed"):
        step(random_tokens(1, 1))
    with pytest.raises(RuntimeError, match="unusable"):
        model(random_tokens(1, 1), past_key_values=cache, use_cache=True)


def test_steps_within_and_outside_inference_mode():
    """Catches: static tensors that belong to inference mode."""
    model, ids_BT = tiny_model(), random_tokens(1, PROMPT)
    cache = model.make_cache()
    with torch.no_grad():
        model(ids_BT, past_key_values=cache, use_cache=True)
    step = RecordedStep(model, cache)
    with torch.inference_mode():
        step(random_tokens(1, 1)), step(random_tokens(1, 1))
    assert step(random_tokens(1, 1)).isfinite().all()
