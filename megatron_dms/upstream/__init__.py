"""All uses of private names of Megatron, modelopt, transformers and torch, and all that we replace there.

Each module has our signature on one side and the library's name on the other; nothing else of ours reaches
for such a name. `hf/` alone is an exception, because an exported checkpoint carries it without this package.
tests/support/touched_names.py lists every touched name with the signature that we rely on: the day
of a new release begins with that list.

    cpu                    Megatron on a machine without a CUDA device
    wheel                  what the wheel of megatron-core lacks against a checkout of Megatron-LM
    megatron_arguments     defaults of this machine's flags, and Megatron's own checks
    megatron_saving        what Megatron's training loop calls to save and to load, and its file writer
    megatron_loggers       the TensorBoard writer that Megatron's training loop asks for
    megatron_optimizer     the optimizer, which Megatron hands out nowhere
    megatron_rope          frequencies and attention factor of a built model
    modelopt_distillation  student and teacher as one model
    torch_flash_attention  torch's flash attention, forward and backward
    torch_operators        operators of torch that are defined in C++
    torch_checkpoint       torch's distributed checkpoints, read and written without a process group
    transformers_models    classes of transformers' models by model type
    transformers_chat      chat templates, rendered with the spans of the assistant's turns
"""

CHECKED_VERSIONS = {
    "megatron-core": "0.19.2",
    "nvidia-modelopt": "0.47.0",
    "torch": "2.14",
    "transformers": "5.24",
}
"""The releases that every touch was checked on."""
