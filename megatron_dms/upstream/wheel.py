"""What the wheel of megatron-core lacks against a checkout of Megatron-LM."""

import importlib.util


def skip_helper_compilation() -> None:
    """Spare Megatron the compilation of its dataset helpers where they are compiled already.

    `initialize_megatron` runs `make` in the package whatever the package holds. The wheel has the compiled
    helper but no Makefile, so Megatron would exit.
    """
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        import megatron.core.datasets.utils as datasets_utils

        datasets_utils.compile_helpers = lambda: None
