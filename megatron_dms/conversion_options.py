"""Names that the conversion's command line offers. The module imports nothing, so that --help is quick."""

FORMATS = ("megatron_dms", "nvidia", "fastdms")
"""How a DMS model can be written as an HF checkpoint; conversion/dms_formats.py says what each is."""
LAYOUT_SIZES = {"tp1": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}
"""The layouts of ranks at which `verify` compares logits: name -> (tensor parallel, pipeline parallel)."""
CARD = "parity_card.json"
"""Name of the parity card in the Megatron folder, where the caller names no other place."""
