"""Compare a Megatron checkpoint with an HF one: tensors bit for bit, then logits of the two models.

The logits come from two implementations, transformers' own model and Megatron's GPTModel at several layouts
of ranks, all in fp32, so that a wrong name, a wrong order of heads, a wrong epsilon or wrong RoPE frequencies
show even where every tensor agrees with itself. The result is a parity card.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch

from megatron_dms.conversion.families import Model
from megatron_dms.conversion.hf_folder import HFFolder
from megatron_dms.conversion.megatron_tensors import MegatronTensors
from megatron_dms.conversion.parity.card import LogitParity, ParityCard, TensorParity, check_writable
from megatron_dms.conversion.parity.outputs import Outputs, agreement
from megatron_dms.conversion.parity.prompts import NotCompared, Prompts, choose_prompts, original_context
from megatron_dms.conversion.parity.ranks import Layout, Task, megatron_outputs
from megatron_dms.conversion.parity.reference_model import reference_outputs
from megatron_dms.conversion_options import CARD, LAYOUT_SIZES
from megatron_dms.errors import CheckpointError
from megatron_dms.formats.megatron_folder import RELEASE
from megatron_dms.formats.tensor_rows import same_bits
from megatron_dms.hf.configuration_dms import LATER_FIELDS, DMSSettings

LAYOUTS = {name: Layout(tp, pp) for name, (tp, pp) in LAYOUT_SIZES.items()}
"""The layouts at which logits are compared, by the names that the command line gives them."""

Say = Callable[[str], None]
"""A function that is called with one line for each step."""


def verify(
    hf_dir: str | Path,
    megatron_dir: str | Path,
    iteration: int | None = None,
    prompt_tokens: int = 64,
    layouts: Sequence[str] = tuple(LAYOUTS),
    card: str | Path | None = None,
    say: Say = lambda line: None,
    accepted_keys: Collection[str] = (),
    accepted_arguments: Collection[str] = (),
) -> ParityCard:
    """Compare the two checkpoints, and write the card.

    Raises CheckpointError if either cannot be read, if they describe different models, if a model cannot be
    run, or if the card cannot be written. Nothing is written then.
    """
    hf, megatron = HFFolder(Path(hf_dir)), Path(megatron_dir)
    stored = MegatronTensors.open(megatron, iteration, hf.path, accepted_keys, accepted_arguments)
    model = stored.model
    _check_same_dms(model.dms, stored.dms_fields)
    sets, not_compared = choose_prompts(model, prompt_tokens)
    path = Path(card) if card is not None else megatron / CARD
    check_writable(path)

    say(f"comparing {len(stored.places)} tensors")
    tensors = compare_tensors(hf, stored, imported=stored.reader.folder.name == RELEASE)
    # An export rounds what training kept in a wider type: the model compared is the exported one.
    firsts = {row.megatron: row.hf_names(0)[0] for row in stored.rows}
    rounded = {key: hf.infos[name].dtype for key, name in firsts.items() if name in hf.infos}
    say("running transformers' model")
    reference = reference_outputs(hf, model, sets)
    logits: list[LogitParity] = []
    for layout in (LAYOUTS[name] for name in layouts):
        if obstacle := layout.obstacle(model):
            not_compared.append(NotCompared(f"layout {layout.name}", f"not possible: {obstacle}"))
            continue
        say(f"running Megatron's model at {layout.name}")
        (found,) = megatron_outputs(layout, [Task(megatron, iteration, sets, rounded)])
        logits += compare_logits(model, layout, sets, reference, found)
    result = ParityCard(stored.reader.folder.name, model, tensors, logits, not_compared)
    result.write(path)
    return result


def compare_tensors(hf: HFFolder, stored: MegatronTensors, imported: bool) -> list[TensorParity]:
    """Compare every tensor of either side, one at a time.

    imported: types must agree, for an import keeps them; else the Megatron tensor is cast first, for training
    may work in another type and export casts back.
    """
    if stored.model.tied and "lm_head.weight" in hf.infos:
        stored.places["lm_head.weight"] = stored.places["model.embed_tokens.weight"]

    def compare(name: str) -> TensorParity:
        if name not in hf.infos:
            tensor = stored.read(name)
            return TensorParity(name, False, _name(tensor.dtype), tuple(tensor.shape), only_in="Megatron")
        info = hf.infos[name]
        dtype, shape = _name(info.dtype), tuple(info.shape)
        if not stored.holds(name):
            return TensorParity(name, False, dtype, shape, only_in="HF")
        tensor = stored.read(name)
        equal = same_bits(hf.read(name), tensor if imported else tensor.to(info.dtype))
        return TensorParity(name, equal, dtype, shape)

    return [compare(name) for name in dict.fromkeys([*hf.infos, *stored.places])]


def compare_logits(
    model: Model,
    layout: Layout,
    sets: Sequence[Prompts],
    reference: Sequence[Outputs],
    found: Sequence[Outputs],
) -> list[LogitParity]:
    """Compare the logits of each set of prompts."""
    window, lag = (model.dms.window, model.dms.lag) if model.dms else (0, 0)
    original = original_context(model)
    return [
        LogitParity(
            layout=layout.name,
            prompts=prompts.count,
            tokens=len(prompts.positions),
            first_position=prompts.positions[0],
            last_position=prompts.positions[-1],
            past_original_context=None if original is None else prompts.positions[-1] >= original,
            agreement=agreement(theirs, ours, window, lag),
        )
        for prompts, theirs, ours in zip(sets, reference, found, strict=True)
    ]


def _check_same_dms(hf: DMSSettings | None, megatron: Mapping[str, object] | None) -> None:
    """Check that both sides decide by the same settings (the temperature plays a part in training only)."""
    if hf is None and megatron is None:
        return
    if hf is None or megatron is None:
        with_dms, without = ("Megatron", "HF") if hf is None else ("HF", "Megatron")
        raise CheckpointError(
            f"the {with_dms} checkpoint has DMS and the {without} checkpoint has none; compare a trained "
            "checkpoint with its export, or a base model with its import"
        )
    stored = {**LATER_FIELDS, **megatron}
    for name, value in {**LATER_FIELDS, **hf.stored()}.items():
        if name != "temperature" and stored.get(name) != value:
            raise CheckpointError(
                f"DMS setting {name} is {value!r} in the HF checkpoint and {stored.get(name)!r} in the "
                "Megatron checkpoint, expected the same"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
