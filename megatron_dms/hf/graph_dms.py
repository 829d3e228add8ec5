"""Decode steps replayed as a CUDA graph: one launch instead of some dozen launches for each layer.

    logits_BTV = model(prompt_BT, past_key_values=cache).logits  # cache = model.make_cache()
    token_B1 = logits_BTV[:, -1].argmax(dim=-1, keepdim=True)
    step = GraphedStep(model, cache)
    while ...:
        token_B1 = step(token_B1).argmax(dim=-1, keepdim=True)

A step changes the cache in place, and the host waits for nothing from the device, so the launches do not
depend on the lengths, the decisions or the pages opened. This file does the host's share: pages for
the tokens to come, and counters. After the cache's tensors have moved (pools have grown, sequences were
reordered, a prompt came in between), one step runs as usual, which compiles and warms up, and the next step
is captured.

Shapes: B sequences, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .cache_dms import CACHE_NAME, DMSCache

STEPS_AHEAD = 128
"""Tokens, all of them kept by every head, for which a growth makes room: 2 or 3 pages per head. With fewer
tokens, the graph would be captured more often."""


class GraphedStep:
    """`step(ids_B1)` is the model's forward with one token for each sequence, and returns the logits."""

    device_type = "cuda"

    def __init__(self, model, cache: DMSCache) -> None:
        """
        Args:
            model: a DMSForCausalLM in eval mode, on one CUDA device. Its weights must not move.
            cache: a cache of the model that has had its prompt. It may be used without this object in
                between.

        Raises:
            ValueError: the model or the cache does not fit this description.
        """
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) > 1 or model.device.type != self.device_type:
            found = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"the model is on {found}; a graph needs one {self.device_type} device")
        if getattr(model.model.rotary_emb, "rope_type", None) in ("dynamic", "longrope"):
            raise ValueError("the model's RoPE asks for the longest sequence at each step, a graph cannot")
        self.model = model
        self.cache = cache
        self._refuse_unready()
        # Address and size of each tensor of the cache, when last seen.
        self._places: list[tuple[int, int]] = []
        self._ids_B1 = torch.empty(0, dtype=torch.int64)  # what the graph reads, from the first warm-up on
        self._logits_BV = torch.empty(0)  # what the graph writes, from the first capture on
        self._replay: Callable[[], None] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None

    @torch.inference_mode(False)  # the tensors made here must serve outside of it, too
    @torch.no_grad()
    def __call__(self, ids_B1: Tensor) -> Tensor:
        """[B, V]: the logits after the tokens `ids_B1` [B, 1], none of which may be padding.

        The next call overwrites the logits.

        Raises:
            ValueError: the ids have another shape, or the model or the cache no longer fits the description
                in __init__.
            RuntimeError: see DMSCache.refuse_if_broken.
        """
        self._refuse_unready()
        cache = self.cache
        cache.make_room(STEPS_AHEAD)
        state = cache.state
        B = len(state[0])
        if ids_B1.shape != (B, 1):
            raise ValueError(f"ids_B1 is {list(ids_B1.shape)}, expected one token per sequence, [{B}, 1]")
        places = [(part.data_ptr(), part.nbytes) for part in state]
        at_limit = cache.get_seq_length() >= self.model.max_positions  # the model then reads the lengths
        if places != self._places or at_limit:
            self._places, self._replay = places, None
            self._ids_B1 = ids_B1.to(self.model.device, copy=True)
            return self._warm_up()
        self._ids_B1.copy_(ids_B1)
        try:
            replay = self._replay
            if replay is None:
                self._replay = replay = self._capture()  # does the host's share, and launches nothing
            else:
                cache.count_step()
                self.model._dms_meter = cache.meter
            replay()
        except BaseException:
            cache.give_up()  # the host's share is done, but the device's share is not
            raise
        return self._logits_BV

    def _forward(self) -> Tensor:
        """[B, V]: one forward. Without position_ids, transformers would use the number of columns, which is
        a number of the host's and would be frozen in the graph."""
        cache = self.cache
        out = self.model(
            self._ids_B1, position_ids=cache.seen_B[:, None], use_cache=True, **{CACHE_NAME: cache}
        )
        return out.logits[:, -1]

    def _warm_up(self) -> Tensor:
        """Run a step as usual, but on the stream that will capture, so that the stream has its workspaces."""
        device = self.model.device
        current = torch.cuda.current_stream(device)
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            logits_BV = self._forward()
        current.wait_stream(self._stream)
        return logits_BV.clone()  # the other stream may overwrite its own tensors

    def _capture(self) -> Callable[[], None]:
        """Capture a step; returns its replay, which writes `_logits_BV`."""
        graph = torch.cuda.CUDAGraph()
        # The old graph lives until the new one has joined its memory pool: a pool without a graph is freed.
        pool = None if self._graph is None else self._graph.pool()
        with torch.cuda.graph(graph, pool=pool, stream=self._stream):
            self._logits_BV = self._forward()
        self._graph = graph
        return graph.replay

    def _refuse_unready(self) -> None:
        model, cache = self.model, self.cache
        if model.training:
            raise ValueError("the model is in training mode; call model.eval()")
        if torch.is_autocast_enabled(self.device_type):
            raise ValueError("autocast is on: it drops the weights it casts, which a graph would still read")
        if not isinstance(cache, DMSCache) or cache.get_seq_length() == 0:
            raise ValueError(f"the {type(cache).__name__} is no DMS cache with a prompt in it")
        model._settle_cache({CACHE_NAME: cache})  # refuses a cache of another model, or a broken one
        if cache.copies > 1:
            raise ValueError(
                f"each sequence of the cache stands for {cache.copies} of the batch; call cache.fork() first"
            )
