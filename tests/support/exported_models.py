"""Exported models: a tiny random model with its code and with the tiny reasoner's tokenizer."""

import shutil
from pathlib import Path

from transformers import PreTrainedModel

from megatron_dms.hf import export_files
from tests.support.tiny_dms_models import tiny_model
from tests.support.tools import ROOT


def export(model: PreTrainedModel, folder: Path) -> None:
    """Write a model with the code that an exported folder has."""
    model.save_pretrained(folder)
    for file in export_files():
        shutil.copy(file, folder)


BASE = ROOT / "examples" / "tiny_reasoner" / "base"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def export_with_tokenizer(folder: Path, **settings: object) -> Path:
    """Export a tiny random model with the tiny reasoner's tokenizer."""
    export(tiny_model(vocab_size=72, **settings), folder)
    for name in TOKENIZER:
        shutil.copy(BASE / name, folder)
    return folder
