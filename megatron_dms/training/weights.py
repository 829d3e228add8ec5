"""The sources of weights, for the student and the teacher: a Megatron checkpoint or an HF folder.

Both describe their model before anything is built. Later they load a model that is built, each rank its part.
"""

import shutil
from abc import ABC, abstractmethod
from argparse import Namespace
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dms.conversion.export_files import of_source, write_side_files
from megatron_dms.conversion.families import read_model
from megatron_dms.conversion.hf_folder import HFFolder
from megatron_dms.conversion.hf_weights import load_hf_weights
from megatron_dms.errors import CheckpointError
from megatron_dms.files import staged_folder
from megatron_dms.formats.megatron_folder import HF, open_checkpoint
from megatron_dms.formats.torch_dist import Reader

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


class Weights(ABC):
    """A checkpoint, opened but not loaded."""

    folder: Path
    args: Namespace
    """The architecture under Megatron's names, and `dms` if the model was retrofitted."""
    iteration: int
    """The training steps after which it was saved; 0 if it was never trained here."""
    tokenizer_folder: Path
    """The folder of its HF side files."""

    @abstractmethod
    def load(self, models: "list[GPTModel]") -> None:
        """Load this rank's part of the weights. All ranks call this together.

        If the checkpoint holds no linear predictor, the predictor of the models stays as it was initialised.

        Args:
            models: this rank's virtual pipeline stages, or its one stage.
        """

    def has_hf_files(self, save: Path) -> bool:
        """Return whether `save`/hf holds this model's config.json already."""
        ours, theirs = self.tokenizer_folder / "config.json", save / HF / "config.json"
        return ours.is_file() and theirs.is_file() and ours.read_bytes() == theirs.read_bytes()

    @abstractmethod
    def carry_hf_files(self, save: Path) -> None:
        """Put the HF side files into the folder `save`/hf, where an export of new checkpoints needs them."""

    def _wanted(self, model: "GPTModel") -> dict[str, object]:
        """Return the model's sharded state, without a predictor that the checkpoint does not hold."""
        from megatron.core.process_groups_config import ProcessGroupCollection

        held = (getattr(self.args, "dms", None) or {}).get("predictor")
        metadata = {"dp_cp_group": ProcessGroupCollection.use_mpu_process_groups().dp_cp}
        state = model.sharded_state_dict(metadata=metadata)
        return {
            name: part for name, part in state.items() if held == "linear" or ".dms_predictor." not in name
        }


class MegatronWeights(Weights):
    """One iteration (None: the latest) of a Megatron checkpoint folder, all of whose files are present."""

    def __init__(self, folder: Path, iteration: int | None = None) -> None:
        self.folder = folder
        reader, self.args = open_checkpoint(folder, iteration)
        self.iteration_folder = reader.folder
        self.iteration = iteration or self._said_iteration(reader)
        self.tokenizer_folder = folder / HF

    @staticmethod
    def _said_iteration(reader: Reader) -> int:
        """Return the iteration that a checkpoint says it was saved at; 0 if it says none."""
        said = reader.common().get("iteration", 0)
        if not isinstance(said, int):
            raise CheckpointError(f"{reader.folder} says iteration {said!r}, expected a number")
        return said

    def load(self, models: "list[GPTModel]") -> None:
        """See Weights.

        Raises:
            KeyError: a tensor is missing, or does not belong to the model.
        """
        from megatron.core import dist_checkpointing

        # All stages are loaded at once, as Megatron insists that every layer is asked for. They are nested,
        # because Megatron adds what the checkpoint holds in common (its arguments) beside them.
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
    """An HF folder. The names and shapes of its tensors are checked against its config.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = self.tokenizer_folder = folder
        self.iteration = 0
        self._source = HFFolder(folder)
        model = read_model(self._source.config, self._source.dms_metadata, head_size=self._source.head_size())
        self._rows = model.rows()
        self._layout = of_source(self._source, model, self._rows)
        self.args = Namespace(**model.family.megatron_args(model), dms=model.dms and model.dms.stored())

    def load(self, models: "list[GPTModel]") -> None:
        """See Weights. Only the slices that this rank needs are read."""
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
    """Open an HF folder (which has a config.json) or a Megatron checkpoint.

    Raises:
        CheckpointError: the folder is neither of the two, or it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}; give a HF folder or a Megatron checkpoint")
    if (folder / "config.json").is_file():
        return HFWeights(folder)
    return MegatronWeights(folder, iteration)
