"""The private folder for what can be made again: downloads, compiled programs, reference log-probs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's private easydel cache, made if absent: ``$XDG_CACHE_HOME/easydel``, else ``~/.cache/easydel``."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The base directory specification asks to ignore a relative path.
    folder = (root if root.is_absolute() else Path.home() / ".cache") / "easydel"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder
