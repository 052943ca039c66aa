"""The command `sgpt` as `python -m sgpt_jax.cli`."""

import sys

from sgpt_jax.cli.parser import main

if __name__ == "__main__":
    sys.exit(main())
