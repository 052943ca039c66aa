"""How transformers, which tokenises, is imported."""

from __future__ import annotations

import os
from typing import Any

_QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


def import_transformers() -> Any:
    """The package, which takes most of a second; it does not tell that there is no torch, which nothing here needs."""
    before = os.environ.get(_QUIET)
    os.environ[_QUIET] = "1"
    try:
        import transformers
    finally:
        if before is None:
            del os.environ[_QUIET]
        else:
            os.environ[_QUIET] = before
    return transformers
