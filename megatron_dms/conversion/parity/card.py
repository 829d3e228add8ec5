"""The parity card: what was compared between an HF and a Megatron checkpoint, how far it agrees, and what was
not compared. Written as JSON and, beside it, as a short table in Markdown.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from megatron_dms.conversion.families import Model
from megatron_dms.conversion.parity.outputs import LOGIT_TOLERANCE, Agreement
from megatron_dms.conversion.parity.prompts import NotCompared
from megatron_dms.errors import CheckpointError
from megatron_dms.files import partial_path
from megatron_dms.formats.megatron_folder import RELEASE

_PACKAGES = ("torch", "transformers", "megatron-core")
_NAMES_SHOWN = 10


@dataclass(frozen=True)
class TensorParity:
    """The comparison of one HF tensor. only_in: the one side that has it, None where both do. dtype and
    shape: HF's, if it has it.
    """

    name: str
    equal: bool
    dtype: str
    shape: tuple[int, ...]
    only_in: str | None = None


@dataclass(frozen=True)
class LogitParity:
    """The comparison of one set of prompts at one layout. past_original_context: None where RoPE is not
    scaled, or scaled without an original context being named.
    """

    layout: str
    prompts: int
    tokens: int
    first_position: int
    last_position: int
    past_original_context: bool | None
    agreement: Agreement


@dataclass(frozen=True)
class ParityCard:
    """All comparisons. checkpoint: the name of the folder that was read, "release" for an import."""

    checkpoint: str
    model: Model
    tensors: list[TensorParity]
    logits: list[LogitParity]
    not_compared: list[NotCompared]

    @property
    def tensors_equal(self) -> bool:
        return all(tensor.equal for tensor in self.tensors)

    @property
    def max_abs_logit_diff(self) -> float | None:
        """The largest difference of all comparisons; None without a comparison, NaN if any is NaN."""
        found = [row.agreement.max_abs_logit_diff for row in self.logits]
        return math.nan if any(map(math.isnan, found)) else max(found, default=None)

    @property
    def argmax_agreement(self) -> float | None:
        """The least agreement of all comparisons."""
        return min((row.agreement.argmax_agreement for row in self.logits), default=None)

    @property
    def passed(self) -> bool:
        """Whether everything that was compared agrees; never without a comparison of logits."""
        return self.tensors_equal and bool(self.logits) and all(row.agreement.passed for row in self.logits)

    def summary(self) -> dict[str, object]:
        """Return the result in a few entries, as JSON has it."""
        return {
            "passed": self.passed,
            "tensors_equal": self.tensors_equal,
            "tensors": len(self.tensors),
            "max_abs_logit_diff": _finite(self.max_abs_logit_diff),
            "argmax_agreement": self.argmax_agreement,
            "layouts": list(dict.fromkeys(row.layout for row in self.logits)),
        }

    def to_json(self) -> dict[str, object]:
        """Return everything, as JSON has it."""
        model = self.model
        return {
            **self.summary(),
            "checkpoint": self.checkpoint,
            "model_type": model.family.model_type,
            "dtype": model.dtype,
            "rope": dict(model.rope),
            "max_position_embeddings": model.positions,
            "tied": model.tied,
            "dms": None if model.dms is None else model.dms.stored(),
            "versions": {name: version(name) for name in _PACKAGES},
            "tolerance": LOGIT_TOLERANCE,
            "logits": [_flat(row) for row in self.logits],
            "not_compared": [asdict(item) for item in self.not_compared],
            "tensor_list": [asdict(tensor) for tensor in self.tensors],
        }

    def to_markdown(self) -> str:
        """Return the card as a short table in Markdown."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        model = self.model
        yield f"# Parity card: {'passed' if self.passed else 'FAILED'}"
        yield ""
        rope = ", ".join(f"{key} {value}" for key, value in model.rope.items() if key != "rope_type")
        yield f"- model: {model.family.model_type}, {model.dtype}, {'tied' if model.tied else 'untied'}"
        yield f"- RoPE: {model.rope['rope_type']} ({rope}), max_position_embeddings {model.positions}"
        if model.dms is not None:
            settings = ", ".join(f"{key} {value}" for key, value in model.dms.stored().items())
            yield f"- DMS: {settings}"
        yield f"- versions: {', '.join(f'{name} {version(name)}' for name in _PACKAGES)}"
        total, unequal = len(self.tensors), [tensor for tensor in self.tensors if not tensor.equal]
        how = "bit for bit" if self.checkpoint == RELEASE else "bit for bit after the cast of an export"
        yield f"- tensors ({self.checkpoint}): {total - len(unequal)} of {total} equal {how}"
        for tensor in unequal[:_NAMES_SHOWN]:
            yield f"  - differs: {tensor.name}" + (f", only in {tensor.only_in}" if tensor.only_in else "")
        if len(unequal) > _NAMES_SHOWN:
            yield f"  - and {len(unequal) - _NAMES_SHOWN} more"
        yield f"- logits: fp32, largest difference allowed {LOGIT_TOLERANCE:.0e}"
        yield ""
        yield from _table([self._head(), *(self._row(row) for row in self.logits)])
        if self.not_compared:
            yield ""
            yield from (f"- not compared: {item.what}: {item.why}" for item in self.not_compared)

    def _head(self) -> list[str]:
        head = ["layout", "prompts", "positions", "past original context", "max abs diff", "argmax agrees"]
        if self.model.dms is not None:
            head += ["evicted", "decisions that differ", "positions compared"]
        return [*head, "result"]

    def _row(self, row: LogitParity) -> list[str]:
        found = row.agreement
        past = {True: "yes", False: "no", None: "-"}[row.past_original_context]
        cells = [row.layout, f"{row.prompts} x {row.tokens}", f"{row.first_position} .. {row.last_position}"]
        cells += [past, f"{found.max_abs_logit_diff:.1e}", f"{found.argmax_agreement:.2%}"]
        if self.model.dms is not None:
            cells += [f"{found.evicted:.1%}", str(found.decisions_differ), f"{found.compared:.1%}"]
        return [*cells, "passed" if found.passed else "FAILED"]

    def write(self, path: Path) -> None:
        """Write `path` (.json) and its sibling .md, each whole or not at all.

        Neither file takes its place before both are written. Raises CheckpointError.
        """
        contents = {
            path: json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n",
            path.with_suffix(".md"): self.to_markdown(),
        }
        try:
            for target, text in contents.items():
                partial_path(target).write_text(text, encoding="utf-8")
            for target in contents:
                partial_path(target).replace(target)
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror}") from error
        finally:
            for target in contents:
                partial_path(target).unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise CheckpointError now if the card could not be written later."""
    if path.suffix != ".json":
        raise CheckpointError(f"--card is {path}, expected a name in .json; the table goes beside it")
    try:
        if path.is_dir() or path.with_suffix(".md").is_dir():
            raise CheckpointError(f"--card is {path}, but a folder has its name or that of its table")
        partial = partial_path(path)
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror}; name another place with --card"
        ) from error


def _finite(value: float | None) -> float | None:
    """Return None for NaN and infinity, which JSON lacks."""
    return value if value is None or math.isfinite(value) else None


def _flat(row: LogitParity) -> Mapping[str, object]:
    entries = asdict(row)
    found = entries.pop("agreement")
    return {**entries, **found, "max_abs_logit_diff": _finite(row.agreement.max_abs_logit_diff)}


def _table(rows: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for index, row in enumerate(rows):
        yield f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |"
        if index == 0:
            yield f"|{'|'.join('-' * (width + 2) for width in widths)}|"
