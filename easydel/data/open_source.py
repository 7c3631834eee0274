"""One function from paths, globs and URLs to a source."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from itertools import groupby
from os import PathLike, fspath
from pathlib import Path

import fsspec

from .files import (
    ArrowSource,
    CompressedJsonLinesSource,
    CsvSource,
    JsonLinesSource,
    JsonSource,
    ParquetSource,
)
from .remote import asking, file_name, is_remote, is_web, local_copy, masked
from .sources import CompositeSource, ShardedDataSource

SourceType = Callable[[list[str]], ShardedDataSource]

SUFFIXES: dict[str, SourceType] = {
    ".jsonl": JsonLinesSource,
    ".ndjson": JsonLinesSource,
    ".json": JsonSource,
    ".parquet": ParquetSource,
    ".arrow": ArrowSource,
    ".feather": ArrowSource,
    ".csv": CsvSource,
    ".tsv": CsvSource,
    ".jsonl.gz": CompressedJsonLinesSource,
    ".jsonl.bz2": CompressedJsonLinesSource,
    ".jsonl.xz": CompressedJsonLinesSource,
}


def open_source(spec: str | PathLike | Iterable[str | PathLike]) -> ShardedDataSource:
    """A source for files named by path, glob, folder, fsspec URL, or a list of these; nothing is read but names.

    The suffix decides how a file is read: one of `SUFFIXES`. A folder stands for the files in it, or for the data
    set that `Dataset.save_to_disk` wrote there. The files of a glob or a folder come in the order of their names.

    Raises:
      FileNotFoundError: nothing goes by that name; names the nearest that do.
      ValueError: a suffix that is not known, or a saved data set with several splits.
    """
    specs = [spec] if isinstance(spec, (str, PathLike)) else list(spec)
    names = [name for one in specs for name in _expand(fspath(one))]
    if not names:
        raise ValueError("no files were named; give a path, a glob, a URL or a list of these.")
    sources = [source_type(list(group)) for source_type, group in groupby(names, _source_type)]
    return sources[0] if len(sources) == 1 else CompositeSource(sources)


def _expand(name: str) -> list[str]:
    """The files that a path, glob, folder or URL stands for."""
    if is_web(name):
        if _suffix(name) is not None:  # otherwise refused by its name; a web server lists no folder
            local_copy(name)
        return [name]
    return asking(name, lambda: _found(name)) if is_remote(name) else _found(name)


def _found(name: str) -> list[str]:
    filesystem, path = fsspec.core.url_to_fs(name)
    remote = "://" in name

    def named(paths: Iterable[str]) -> list[str]:
        return [filesystem.unstrip_protocol(found) if remote else found for found in paths]

    if filesystem.isdir(path):
        if not remote and (saved := _saved_dataset_files(Path(path), name)):
            return saved
        # A folder may bear the name of a file; it is none.
        listed = sorted(inside["name"] for inside in filesystem.ls(path, detail=True) if inside["type"] != "directory")
        found = [inside for inside in listed if _suffix(inside) is not None]
        if not found:
            raise FileNotFoundError(f"the folder {name} holds no file that ends in {_suffixes()}.")
        return [f"{name.rstrip('/')}/{inside.rsplit('/', 1)[-1]}" for inside in found]
    if filesystem.exists(path):
        return [name]
    if any(sign in name for sign in "*?["):
        if found := sorted(filesystem.glob(path)):
            return named(found)
        raise FileNotFoundError(f"no file matches {name}.{_near(path, filesystem)}")
    raise FileNotFoundError(f"there is no file {name}.{_near(path, filesystem)}")


def _saved_dataset_files(folder: Path, name: str) -> list[str]:
    """The Arrow files of a folder that `Dataset.save_to_disk` wrote, in order; none for any other folder."""
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = json.loads(splits.read_text())["splits"]
        raise ValueError(
            f"{name} holds the splits {', '.join(names)}; give the folder of one, such as {name}/{names[0]}."
        )
    state = folder / "state.json"
    if not state.is_file():
        return []
    return [str(folder / entry["filename"]) for entry in json.loads(state.read_text())["_data_files"]]


def _near(path: str, filesystem: fsspec.AbstractFileSystem) -> str:
    """A sentence with the names in the folder that are most like the one asked for."""
    folder, _, wanted = path.rpartition("/")
    if not filesystem.isdir(folder or "."):
        return f" There is no folder {folder} either."
    present = [inside.rsplit("/", 1)[-1] for inside in filesystem.ls(folder or ".", detail=False)]
    near = get_close_matches(wanted, present, n=3, cutoff=0.5) or sorted(filter(_suffix, present))[:3]
    return f" The folder has {', '.join(near)}." if near else " The folder has no data files."


def _suffix(name: str) -> str | None:
    """The longest known suffix of a file name."""
    name = file_name(name).lower()
    return max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len, default=None)


def _source_type(name: str) -> SourceType:
    suffix = _suffix(name)
    if suffix is None:
        raise ValueError(f"{masked(name)} has no known suffix; expected one of {_suffixes()}.")
    # Many .json files are JSON lines; the first character tells.
    if suffix == ".json" and not _is_json_list(name):
        return JsonLinesSource
    return SUFFIXES[suffix]


def _is_json_list(name: str) -> bool:
    with local_copy(name).open("rb") as file:
        return file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _suffixes() -> str:
    return ", ".join(SUFFIXES)
