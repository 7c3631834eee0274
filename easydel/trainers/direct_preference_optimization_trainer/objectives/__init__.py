"""Preference objectives, one file for each or for a close family; importing this package registers all of them."""

from __future__ import annotations

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
