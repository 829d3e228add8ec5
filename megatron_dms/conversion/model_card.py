"""The model card of an exported DMS model: its origin, its training, and how to run and measure it."""

from argparse import Namespace
from pathlib import Path

from megatron_dms.compression_method import MERGING, method_of
from megatron_dms.conversion.dms_formats import DMS

CARD = "README.md"
BASE_CARD = "README_base.md"
"""The file to which the base model's own card moves."""

_DECIDES = {
    "query_channel": "the last channel of the first query head of each group",
    "key_channel": "the last channel of the key",
    "linear": "a linear layer of its own on the residual stream",
}


def model_card(dms: DMS, args: Namespace, iteration: int, base: str, base_card: Path) -> str:
    """Return the card in Markdown, with the front matter that model hubs read.

    dms: the exported settings. args, iteration: of the Megatron checkpoint. base: name of the base model.
    base_card: its own card, whose licence is taken over where there is one.
    """
    if method_of(dms.fields) is MERGING:
        return _card_of_merging(dms, args, iteration, base, base_card)
    settings = dms.settings
    asked = "unknown" if dms.reached_cr is None else f"{dms.reached_cr:g}"
    each = "each KV head" if settings.granularity == "head" else "KV head 0, for all heads of its layer,"
    licence = _licence(base_card)
    return f"""---
base_model: {base}
library_name: transformers
{licence}tags:
- dynamic-memory-sparsification
- kv-cache-compression
---

# {base}, retrofitted with Dynamic Memory Sparsification

The weights of {base}, trained on so that {each} decides by itself which key-value pairs to forget
(DMS, NeurIPS 2025, arXiv 2506.05345). A pair that is marked stays readable for {settings.window} more
tokens and is then dropped for good, so the KV cache stays small.

| | |
|---|---|
| base model | {base} |
| compression ratio asked for by the schedule | {asked} |
| window | {settings.window} tokens |
| who decides | {_DECIDES[settings.predictor]} |
| decision of a pair | read {settings.lag} token(s) later |
{_training(args, iteration)}
{_run(dms, base)}"""


_RUN = """## Run it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
inputs = tokenizer("Why is the sky blue?", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200)[0]))
print(model.last_kv_stats)
```

`last_kv_stats` tells the compression ratio that this text achieved, the KV reads, and the most pairs and
bytes that were held. The ratio above is what training asked for; what a model reaches depends on the text,
and pairs inside the window are never dropped. To compare with the full cache, set `dms_disable_eviction` to
true in `config.json`.
"""
_AS_BASE = """
Without that flag, and in every program that does not run this folder's code, the folder is taken for {base}
itself: {read} Nothing says so.
"""
_RUN_FASTDMS = """## Run it

With FastDMS, which reads `dms_metadata.json`. Every other program takes the folder for {base} itself: {read}
Nothing says so. For transformers, export it with `--dms-format megatron_dms`.
"""
_BORROWED = "it evicts nothing, and reads the channel that the model was trained to leave out."


def _run(dms: DMS, base: str) -> str:
    """Say how the model is run, and what other programs do with the folder."""
    read = _BORROWED if dms.settings.predictor != "linear" else "it evicts nothing."
    if dms.format == "fastdms":
        return _RUN_FASTDMS.format(base=base, read=read)
    return _RUN + (_AS_BASE.format(base=base, read=read) if dms.format == "nvidia" else "")


def _card_of_merging(dms: DMS, args: Namespace, iteration: int, base: str, base_card: Path) -> str:
    asked = "unknown" if dms.reached_cr is None else f"{dms.reached_cr:g}"
    return f"""---
base_model: {base}
{_licence(base_card)}tags:
- dynamic-memory-compression
- kv-cache-compression
---

# {base}, retrofitted with merging of key-value pairs

The weights of {base}, trained on so that each KV head merges pairs into the ones before (Dynamic Memory
Compression, ICML 2024, arXiv 2403.09636, as megatron_dms/ops/merging.py defines it), for comparison with
Dynamic Memory Sparsification.

| | |
|---|---|
| base model | {base} |
| compression ratio asked for by the schedule | {asked} |
{_training(args, iteration)}
## Run it

With megatron_dms only; plain transformers refuses it.

```python
from pathlib import Path
from megatron_dms.inference.dmc_model import load_dmc

model = load_dmc(Path(FOLDER), "float32", "cpu")
model.generate(**inputs)
print(model.last_kv_stats)
```
"""


def _training(args: Namespace, iteration: int) -> str:
    """Return the rows of the table that a checkpoint of a training run can fill."""
    settings = getattr(args, "dms", None) or {}
    if "steps_per_cr" not in settings:
        return ""
    what = "all weights" if settings.get("train") == "all" else "the predictor alone"
    teacher = "the frozen base weights" if settings.get("teacher") == "self" else "a frozen teacher"
    rows = {"trained": f"{what}, by distillation from {teacher} ({settings.get('kl')})", "steps": iteration}
    for name, label in (
        ("global_batch_size", "samples a step"),
        ("seq_length", "tokens a sample"),
        ("lr", "lr"),
    ):
        if getattr(args, name, None) is not None:
            rows[label] = getattr(args, name)
    return "".join(f"| {label} | {value} |\n" for label, value in rows.items())


def _licence(card: Path) -> str:
    """Return the `license...:` lines of a card's front matter."""
    if not card.is_file():
        return ""
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in lines[1:]:
        return ""
    front = lines[1 : lines.index("---", 1)]
    return "".join(f"{line}\n" for line in front if line.startswith("license"))


def model_name(folder: Path) -> str:
    """Return the name of an HF folder's model: "owner/name" in a hub cache
    (…/models--owner--name/snapshots/…), otherwise the folder's own name.
    """
    folder = folder.resolve()
    for parent in (folder, *folder.parents):
        if parent.name.startswith("models--"):
            return parent.name.removeprefix("models--").replace("--", "/")
    return folder.name
