"""import_hf and export_hf read one checkpoint folder and write another, a few rows at a time.

No model is built and no process group is needed. Memory does not grow with the model or its tensors
(formats/tensor_rows.py). An output appears when it is complete and checked; until then its place holds the
old output or nothing (files.py).
"""

import time
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_dms.conversion import export_files
from megatron_dms.conversion.export_settings import Settings
from megatron_dms.conversion.families import Model, read_model
from megatron_dms.conversion.hf_folder import HFFolder, copy_file, side_files
from megatron_dms.conversion.megatron_tensors import MegatronTensors
from megatron_dms.conversion.transforms import MEGATRON_LAYERS, Row, joined
from megatron_dms.errors import CheckpointError
from megatron_dms.files import check_apart, staged_folder
from megatron_dms.formats.megatron_folder import HF, RELEASE, SOURCE, TRACKER
from megatron_dms.formats.safetensors_file import TensorInfo, read_header, write_file
from megatron_dms.formats.tensor_rows import Span
from megatron_dms.formats.torch_dist import Chunk, write

Progress = Callable[[int, int, int, int], None]
"""Called with (tensors done, tensors in all, bytes done, bytes in all)."""

_EXTRA_STATE = (
    # Megatron's local layers and Transformer Engine's layers ask for these
    *("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"),
    # only Transformer Engine's norms ask for these
    *("self_attention.q_layernorm", "self_attention.k_layernorm"),
)


@dataclass(frozen=True)
class Report:
    """What a conversion did: HF tensors, their bytes, and the time it took.

    non_finite: HF name -> number of NaN and infinite values, for each tensor that has some. They are
    converted like all others.
    """

    tensors: int
    bytes: int
    seconds: float
    non_finite: dict[str, int]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread. A piece is too small to divide among threads, and on busy cores the threads'
    waiting for each other was measured to take ten times as long as the conversion.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def import_hf(
    hf_dir: str | Path,
    megatron_dir: str | Path,
    force: bool = False,
    progress: Progress | None = None,
    accepted_keys: Collection[str] = (),
) -> Report:
    """Convert an HF checkpoint to the Megatron checkpoint `<megatron_dir>/release`, for any TP x PP.

    Every tensor keeps its type. Side files go to `<megatron_dir>/hf`. accepted_keys: unknown keys of
    config.json that do not change the model; the checkpoint records them. Raises CheckpointError before
    anything is written if a name, shape, type or setting is not understood, if the disk has too little room,
    or if the two folders overlap.
    """
    begin = time.monotonic()
    check_apart(Path(megatron_dir), Path(hf_dir))
    source = HFFolder(Path(hf_dir))
    model = read_model(source.config, source.dms_metadata, accepted_keys, source.head_size())
    rows = model.rows()
    layout = export_files.of_source(source, model, rows)
    taken = [name for row in rows for layer in row.layers(model.layers) for name in row.hf_names(layer)]
    tally = _Tally([source.infos[name] for name in taken], progress)
    chunks = [chunk for row in rows for chunk in _chunks(source, row, model, tally)]
    with staged_folder(Path(megatron_dir), force, tally.total_bytes) as out:
        release = out / RELEASE
        release.mkdir()
        write(release, chunks, _extra_states(model), _common_state(model))
        export_files.write_side_files(source, layout, out / HF, accepted_keys)
        (out / TRACKER).write_text(RELEASE)  # last: without it nobody takes a folder for a checkpoint
    return tally.report(time.monotonic() - begin)


@_one_thread()
def export_hf(
    megatron_dir: str | Path,
    hf_dir: str | Path,
    iteration: int | None = None,
    hf_source: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
    dms_format: str | None = None,
    accepted_keys: Collection[str] = (),
    accepted_arguments: Collection[str] = (),
) -> Report:
    """Convert a Megatron checkpoint to an HF checkpoint.

    iteration: None means the latest. hf_source: folder with config.json, tokenizer and so on,
    `<megatron_dir>/hf` if not given. dms_format: one of FORMATS (conversion_options.py); None means that of
    the imported model, else megatron_dms. accepted_keys, accepted_arguments: unknown keys of config.json and
    unknown arguments of Megatron that do not change the model. Tensors are cast to the type they had on
    import (that of config.json, where that is not known), so that fp32 training of a bfloat16 model gives a
    bfloat16 model.
    Errors as for `import_hf`.
    """
    begin = time.monotonic()
    check_apart(Path(hf_dir), Path(megatron_dir), *([] if hf_source is None else [Path(hf_source)]))
    tensors = MegatronTensors.open(
        Path(megatron_dir), iteration, hf_source, accepted_keys, accepted_arguments
    )
    layout = export_files.for_export(tensors)
    tally = _Tally(layout.infos.values(), progress)
    settings = Settings.plan(tensors, dms_format)
    with staged_folder(Path(hf_dir), force, tally.total_bytes) as out:
        for file, infos in layout.files().items():
            stream = ((name, tally.pieces(tensors.spans(name), info.dtype)) for name, info in infos.items())
            write_file(out / file, infos, stream)
            if read_header(out / file) != infos:
                raise CheckpointError(f"{out / file}: the header came out otherwise than planned")
        layout.write_index(out, tensors.side_folder)
        for name in side_files(tensors.side_folder):
            if str(name) not in settings.replaced | {SOURCE, export_files.INDEX}:
                copy_file(tensors.side_folder / name, out / name)
        settings.write(out)  # config.json last
    return tally.report(time.monotonic() - begin)


class _Tally:
    """Counts tensors, bytes and values that are not finite as the pieces pass, and reports the progress."""

    def __init__(self, infos: Iterable[TensorInfo], progress: Progress | None) -> None:
        sizes = [info.nbytes for info in infos]
        self.total, self.total_bytes = len(sizes), sum(sizes)
        self.progress = progress
        self.done = 0
        self.bytes = 0
        self.non_finite: dict[str, int] = {}

    def pieces(self, spans: list[Span], dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the rows of one or several whole HF tensors, cast to `dtype`."""
        for span in spans:
            for stored in span.pieces():
                piece = stored.to(dtype)
                # both are NaN if any value is; isfinite alone is 20 times slower, so it only counts
                if not all(torch.isfinite(bound) for bound in piece.aminmax()):
                    count = int((~piece.isfinite()).sum())
                    self.non_finite[span.name] = self.non_finite.get(span.name, 0) + count
                self.bytes += piece.nbytes
                yield piece
        self.done += len({span.name for span in spans})
        if self.progress is not None:
            self.progress(self.done, self.total, self.bytes, self.total_bytes)

    def report(self, seconds: float) -> Report:
        return Report(self.total, self.total_bytes, seconds, self.non_finite)


def _chunks(source: HFFolder, row: Row, model: Model, tally: _Tally) -> Iterator[Chunk]:
    """Yield the tensors of one row, one per layer. The writer reads each tensor when it needs it."""
    layers = row.layers(model.layers)
    dtypes = {name: source.infos[name].dtype for layer in layers for name in row.hf_names(layer)}
    if len(set(dtypes.values())) > 1:  # the stored tensor has one type for all layers
        first, other = next((a, b) for a in dtypes for b in dtypes if dtypes[a] != dtypes[b])
        raise CheckpointError(
            f"{first} is {dtypes[first]}, but {other} is {dtypes[other]}; one kind must share one type"
        )
    dtype = next(iter(dtypes.values()))
    for layer in layers:
        names = row.hf_names(layer)
        spans = joined(row, names, [source.rows(name) for name in names])
        place = (layer, len(layers)) if row.per_layer else (None, None)
        yield Chunk(row.megatron, row.megatron_shape, dtype, partial(tally.pieces, spans, dtype), *place)


def _extra_states(model: Model) -> Iterator[str]:
    """Yield the keys of the empty objects that a model asks for on loading (torch_dist.py)."""
    linear = model.dms is not None and model.dms.predictor == "linear"
    for module in (*_EXTRA_STATE, *(("self_attention.dms_predictor.proj",) if linear else ())):
        for layer in range(model.layers):
            yield f"{MEGATRON_LAYERS}{module}._extra_state/shard_{layer}_{model.layers}"
    yield "decoder.final_layernorm._extra_state/shard_0_1"


def _common_state(model: Model) -> dict[str, object]:
    args = Namespace(**model.family.megatron_args(model))
    if model.dms is not None:
        args.dms, args.dms_reached_cr = model.dms.stored(), model.dms.target_cr
    if model.dtype is not None:
        args.bf16, args.fp16 = model.dtype == "bfloat16", model.dtype == "float16"
    return {
        "args": args,
        "checkpoint_version": 3.0,  # lower ones make Megatron reorder the fused QKV
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
