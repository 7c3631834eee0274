"""Keep compiled programs between runs."""

from __future__ import annotations

import logging

import jax

from easydel.infra.cache_folder import cache_folder

logger = logging.getLogger("easydel")


def enable_compilation_cache() -> None:
    """Let a second start of the same run compile nothing; a folder the caller has chosen for JAX stays as it is."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        try:
            jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        except OSError as error:
            logger.warning("compiled programs are not kept between runs: %s.", error)
