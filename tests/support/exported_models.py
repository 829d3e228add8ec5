"""Exported models: a tiny random model with its code and with the tiny reasoner's tokenizer."""

import shutil
from pathlib import Path

from megatron_dms.hf import export_files
from tests.support.tiny_dms_models import tiny_model


def export(model, folder: Path) -> None:
    model.save_pretrained(folder)
    for file in export_files():
        shutil.copy(file, folder)


ROOT = Path(__file__).resolve().parents[3]
BASE = ROOT / "examples" / "tiny_reasoner" / "base"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def export_with_tokenizer(folder: Path, **settings) -> Path:
    """A random model with the tiny reasoner's tokenizer."""
    export(tiny_model(vocab_size=72, **settings), folder)
    for name in TOKENIZER:
        shutil.copy(BASE / name, folder)
    return folder
