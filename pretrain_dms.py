"""Retrofit a pretrained LLM with DMS, from a clone of the repository: `torchrun pretrain_dms.py FLAGS`.

The command itself is megatron_dms/pretrain.py. An installed package starts it with
`torchrun -m megatron_dms.pretrain FLAGS`.
"""

from megatron_dms.pretrain import main

if __name__ == "__main__":  # a process that saves a checkpoint imports this file again
    main()
