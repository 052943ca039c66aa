"""Compiled programs kept on disk, so that the second start of anything does not compile again."""

from __future__ import annotations

import os

import jax

VARIABLE = "SGPT_COMPILATION_CACHE"


def enable() -> None:
    """Turns on JAX's persistent compilation cache in the user's cache folder.

    Nothing changes where a cache folder is configured already. The environment variable SGPT_COMPILATION_CACHE names
    another folder, or turns the cache off: "off".
    """
    folder = os.environ.get(VARIABLE) or os.path.join(user_cache(), "compiled")
    if folder == "off" or getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    # Most programs here compile in less than the second below which JAX would not keep them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def user_cache() -> str:
    """The folder for what can be made or fetched again: $XDG_CACHE_HOME/sgpt-jax, by default ~/.cache/sgpt-jax."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "sgpt-jax")
