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
            # By itself JAX keeps what took a second to compile; a run's many small programs take seconds together.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        except OSError as error:
            logger.warning("compiled programs are not kept between runs: %s.", error)
