"""The measurements of `megatron-dms bench`; only the command imports them."""
