"""HF checkpoints <-> Megatron checkpoints (torch_dist): one name table per model family, streaming, exact.

    import_hf(hf_dir, megatron_dir)     stores every tensor under Megatron's name, to load at any TP x PP
    export_hf(megatron_dir, hf_dir)     goes the way back: every untrained tensor keeps its bytes
    checkpoint_args(megatron_dir)       returns the arguments in a checkpoint whose files are all there
    megatron_args(config)               returns Megatron's arguments for a config.json
    set_parser_defaults, set_model_args, check_model_args, set_rope    serve a run that loads a checkpoint

tools/convert.py is the command line. Every error is a CheckpointError of one line.
"""

from megatron_dms.conversion.convert import Report, export_hf, import_hf
from megatron_dms.conversion.families import megatron_args
from megatron_dms.conversion.rope import set_rope
from megatron_dms.conversion.training_args import check_model_args, set_model_args, set_parser_defaults
from megatron_dms.errors import CheckpointError
from megatron_dms.formats.megatron_folder import checkpoint_args

__all__ = [
    "CheckpointError",
    "Report",
    "check_model_args",
    "checkpoint_args",
    "export_hf",
    "import_hf",
    "megatron_args",
    "set_model_args",
    "set_parser_defaults",
    "set_rope",
]
