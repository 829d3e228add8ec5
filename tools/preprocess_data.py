#!/usr/bin/env python
"""`megatron-dms preprocess` from a clone, installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_dms.cli.preprocess import main

if __name__ == "__main__":
    sys.exit(main(program="tools/preprocess_data.py"))
