"""Loading a checkpoint and generating from it: exports, plain models, and the methods they are compared with.

checkpoints.py    what the folder of a checkpoint says, without loading it
loading.py        loading an exported DMS model and its tokenizer
dmc_model.py      loading and running an exported model that merges pairs (DMC)
baselines/        loading a plain checkpoint, and training-free methods on it
prompts.py        prompts from a file
generation.py     answering several prompts at once, with any of these models
"""
