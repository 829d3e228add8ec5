"""What the wheel of megatron-core lacks against a checkout of Megatron-LM (checked on 0.19.2)."""

import importlib.util

# Megatron's defaults ask for Transformer Engine and its fused kernels; these run without it.
LOCAL_DEFAULTS = {
    "transformer_impl": "local",
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "no_persist_layer_norm": True,
}


def skip_helper_compilation() -> None:
    """Spare Megatron the compilation of its dataset helpers where they are compiled already.

    `initialize_megatron` runs `make` in the package whatever it holds; the wheel has the compiled helper but
    no Makefile, so that Megatron would exit.
    """
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        import megatron.core.datasets.utils as datasets_utils

        datasets_utils.compile_helpers = lambda: None
