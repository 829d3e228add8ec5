"""Training-free methods that hold or read fewer pairs, on plain checkpoints, with the pages and meter of DMS.

model = load_plain(folder, "float32", "cpu")
model.policy = make_policy("tova", 4.0)
model.generate(input_ids=..., max_new_tokens=...)
model.last_kv_stats.kv_reads

policies.py   the methods and their budgets; imports no torch, like this file
layer.py      the shared layer: it cuts the prompt down, then takes one token at a time
evicting.py   TOVA, H2O and the window: the pair of least worth is dropped
quest.py      Quest: every pair is held, and some pages are read
cache.py      the cache and the meter
model.py      the model classes
loading.py    loading a model from a folder
"""

from .loading import load_plain
from .policies import METHODS, Policy, make_policy

__all__ = ["METHODS", "Policy", "load_plain", "make_policy"]
