"""Keep what can be made again in a private folder: downloads, compiled programs, reference log-probs."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import jax

logger = logging.getLogger("easydel")


def cache_folder() -> Path:
    """The user's private easydel cache, made if absent: ``$XDG_CACHE_HOME/easydel``, else ``~/.cache/easydel``.

    Raises:
      PermissionError: the folder belongs to another user.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG base directory specification says to ignore a relative path.
    folder = (root if root.is_absolute() else Path.home() / ".cache") / "easydel"
    folder.mkdir(parents=True, exist_ok=True)
    # The folder's owner could replace files in it. Root, as in containers, may use a user's folder, unless everybody
    # can write to the folder around it.
    is_shared = bool(folder.parent.stat().st_mode & stat.S_IWOTH)
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid() and (os.getuid() or is_shared):
        raise PermissionError(f"{folder} belongs to another user: set XDG_CACHE_HOME to a folder of your own.")
    folder.chmod(0o700)
    return folder


def enable_compilation_cache() -> None:
    """Keep compiled programs, so that a second start of a run compiles nothing; a cache folder set for JAX stays."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        try:
            jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
            # By default JAX only keeps programs that took a second to compile; many small ones take seconds together.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        except OSError as error:
            logger.warning("compiled programs are not kept between runs: %s.", error)
