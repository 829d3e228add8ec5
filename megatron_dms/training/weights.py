"""Where weights come from, the student's and the teacher's alike: a Megatron checkpoint or an HF folder.

Both say what model they hold before anything is built, and fill a model that is built, each rank its part.
"""

import shutil
from abc import ABC, abstractmethod
from argparse import Namespace
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dms.conversion import CheckpointError
from megatron_dms.conversion.export_files import of_source, write_side_files
from megatron_dms.conversion.families import read_model
from megatron_dms.conversion.hf_folder import HFFolder
from megatron_dms.conversion.hf_weights import load_hf_weights
from megatron_dms.files import staged_folder
from megatron_dms.formats.megatron_folder import HF, open_checkpoint

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


class Weights(ABC):
    """args: the model's architecture (and `dms`, where it was retrofitted), in Megatron's names. iteration:
    the training steps behind it. tokenizer_folder: where its HF files are.
    """

    folder: Path
    args: Namespace
    iteration: int
    tokenizer_folder: Path

    @abstractmethod
    def load(self, models: "list[GPTModel]") -> None:
        """Fill the parts of this rank (its virtual pipeline stages, or one model); a linear predictor that is
        not held stays as it was initialised. Collective.
        """

    def has_hf_files(self, save: Path) -> bool:
        """Whether `save`/hf holds this model's config.json already."""
        ours, theirs = self.tokenizer_folder / "config.json", save / HF / "config.json"
        return ours.is_file() and theirs.is_file() and ours.read_bytes() == theirs.read_bytes()

    @abstractmethod
    def carry_hf_files(self, save: Path) -> None:
        """Put the HF side files into the folder `save`/hf, beside new checkpoints: export needs them."""

    def _wanted(self, model: "GPTModel") -> dict[str, object]:
        """The model's sharded state, less a predictor that is not here."""
        from megatron.core.process_groups_config import ProcessGroupCollection

        held = (getattr(self.args, "dms", None) or {}).get("predictor")
        metadata = {"dp_cp_group": ProcessGroupCollection.use_mpu_process_groups().dp_cp}
        state = model.sharded_state_dict(metadata=metadata)
        return {
            name: part for name, part in state.items() if held == "linear" or ".dms_predictor." not in name
        }


class MegatronWeights(Weights):
    """One iteration (None: the latest) of a Megatron checkpoint folder, every file's presence checked."""

    def __init__(self, folder: Path, iteration: int | None = None) -> None:
        self.folder = folder
        reader, self.args = open_checkpoint(folder, iteration)
        self.iteration_folder = reader.folder
        self.iteration = iteration or int(reader.common().get("iteration", 0))
        self.tokenizer_folder = folder / HF

    def load(self, models: "list[GPTModel]") -> None:
        """See Weights. Raises KeyError if a tensor is missing or does not belong to the model."""
        from megatron.core import dist_checkpointing

        # All stages at once: Megatron insists that every layer is asked for. Nested, because what the file
        # holds in common (its arguments) is added beside it.
        wanted = {str(stage): self._wanted(model) for stage, model in enumerate(models)}
        fresh = [set(model.state_dict()) - set(wanted[str(stage)]) for stage, model in enumerate(models)]
        loaded = dist_checkpointing.load(wanted, str(self.iteration_folder))
        for stage, model in enumerate(models):
            missing, unexpected = model.load_state_dict(loaded[str(stage)], strict=False)
            wrong = [
                name
                for name in (*missing, *unexpected)
                if name not in fresh[stage] and "_extra_state" not in name
            ]
            if wrong:
                raise KeyError(f"{self.folder}: {', '.join(wrong)} do not match the model")

    def carry_hf_files(self, save: Path) -> None:
        """See Weights."""
        if self.tokenizer_folder.is_dir():
            with _new_hf_folder(save) as staged:
                shutil.copytree(self.tokenizer_folder, staged, dirs_exist_ok=True)


class HFWeights(Weights):
    """An HF folder, its tensors' names and shapes checked against its config.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = self.tokenizer_folder = folder
        self.iteration = 0
        self._source = HFFolder(folder)
        model = read_model(self._source.config, self._source.dms_metadata)
        self._rows = model.rows()
        self._layout = of_source(self._source, model, self._rows)
        self.args = Namespace(**model.family.megatron_args(model), dms=model.dms and model.dms.stored())

    def load(self, models: "list[GPTModel]") -> None:
        """See Weights; only the slices that this rank needs are read."""
        for model in models:
            load_hf_weights(self._wanted(model), self._rows, self._source)

    def carry_hf_files(self, save: Path) -> None:
        """See Weights."""
        with _new_hf_folder(save) as staged:
            write_side_files(self._source, self._layout, staged)


def _new_hf_folder(save: Path) -> AbstractContextManager[Path]:
    save.mkdir(parents=True, exist_ok=True)
    return staged_folder(save / HF, force=True)


def open_weights(folder: str | Path, iteration: int | None = None) -> Weights:
    """An HF folder (it has a config.json) or a Megatron checkpoint.

    Raises:
        CheckpointError: neither of the two, or a damaged one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}; give a HF folder or a Megatron checkpoint")
    if (folder / "config.json").is_file():
        return HFWeights(folder)
    return MegatronWeights(folder, iteration)
