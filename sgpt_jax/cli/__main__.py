"""The command `sgpt` as `python -m sgpt_jax.cli`."""

import sys

from sgpt_jax.cli.parser import main

sys.exit(main())
