"""`python -m megatron_dms.cli` is the console command `megatron-dms`."""

import sys

from megatron_dms.cli import main

if __name__ == "__main__":
    sys.exit(main())
