"""The private folder for what can be made again: downloads, compiled programs, reference log-probs."""

import os
import stat
from pathlib import Path


def cache_folder() -> Path:
    """The user's private easydel cache, made if absent: ``$XDG_CACHE_HOME/easydel``, else ``~/.cache/easydel``.

    Raises:
      PermissionError: somebody else made it, in a folder where everybody may.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The base directory specification asks to ignore a relative path.
    folder = (root if root.is_absolute() else Path.home() / ".cache") / "easydel"
    folder.mkdir(parents=True, exist_ok=True)
    # Its owner could replace files in it. Root, as in containers, may use a user's, unless everybody can write there.
    is_shared = bool(folder.parent.stat().st_mode & stat.S_IWOTH)
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid() and (os.getuid() or is_shared):
        raise PermissionError(f"{folder} belongs to another user: set XDG_CACHE_HOME to a folder of your own.")
    folder.chmod(0o700)
    return folder
