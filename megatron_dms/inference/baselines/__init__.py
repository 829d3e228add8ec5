"""Training-free ways to hold or read fewer pairs, on plain checkpoints, over the pages and the meter of DMS.

model = load_plain(folder, "float32", "cpu")
model.policy = make_policy("tova", 4.0)
model.generate(input_ids=..., max_new_tokens=...)
model.last_kv_stats.kv_reads

policies.py   which methods there are, and their budget   (no torch, like this file)
layer.py      what they share: a prompt that is cut down, then steps of one token each
evicting.py   TOVA, H2O and the window: what is worth least goes
quest.py      Quest: all is held, a part is read
cache.py      the cache and the meter
model.py      the model's classes
loading.py    a folder's model
"""

from .loading import load_plain
from .policies import METHODS, Policy, make_policy

__all__ = ["METHODS", "Policy", "load_plain", "make_policy"]
