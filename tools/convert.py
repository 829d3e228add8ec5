#!/usr/bin/env python
"""`megatron-dms convert` from a clone, installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_dms.cli.convert import main

if __name__ == "__main__":
    sys.exit(main(program="tools/convert.py"))
