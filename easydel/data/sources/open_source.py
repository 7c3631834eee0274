"""Open paths, globs, folders and URLs as one source of rows, each file by its suffix."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from itertools import groupby
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import fsspec

from easydel.data.faults import DataError, describe, in_quotes
from easydel.data.sources.base import CompositeSource, ShardedDataSource
from easydel.data.sources.byte_index import BYTE_ORDER_MARK
from easydel.data.sources.files import (
    ArrowSource,
    CompressedJsonLinesSource,
    CsvSource,
    JsonLinesSource,
    JsonSource,
    ParquetSource,
)
from easydel.data.sources.local_file import regular_file
from easydel.data.sources.remote import asking, file_name, is_remote, is_web, local_copy, masked
from easydel.data.sources.text_files import parse_json, refuse_other_kinds

FIRST_LINE_BYTES = 1 << 20

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
    """Open files named by path, glob, folder, URL, or a list of these, as one source; rows are read later.

    The suffix, one of `SUFFIXES`, decides how a file is read; only a ``.json`` file is looked into. A folder stands for
    the files in it, or for the data set that `Dataset.save_to_disk` wrote there. The files of a glob or a folder are
    sorted by name.

    Raises:
      FileNotFoundError: there is no such file; names similar ones.
      ValueError: the suffix is not known, or a saved data set has several splits.

    Example:
      >>> source = open_source("train.jsonl")
      >>> len(source), source.locate(2)
      (6, 'train.jsonl, row 2')
      >>> len(open_source(["helpful.jsonl", "harmless.jsonl"]))
      6
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
        # A folder whose name ends in a known suffix is still no file.
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
        names = _listed(splits, "splits", str)
        raise DataError(
            f"{name} holds the splits {in_quotes(names)}; give the folder of one, such as {name}/{names[0]:.40}."
        )
    state = folder / "state.json"
    if not state.is_file():
        return []
    files = [entry.get("filename") for entry in _listed(state, "_data_files", dict)]
    for file in files:
        # Files outside the folder are refused.
        if not isinstance(file, str) or Path(file).name != file or not os.path.isfile(folder / file):
            raise DataError(f"{state} names {describe(file)}, which is no file beside it. Save the data set again.")
    return [str(folder / file) for file in files]


def _listed(path: Path, key: str, kind: type) -> list[Any]:
    """The list under a key of a JSON file that `datasets` wrote."""
    try:
        regular_file(path, str(path))
        held = parse_json(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}. Save the data set again.") from error
    found = held.get(key) if isinstance(held, dict) else None
    if not isinstance(found, list) or not found or not all(isinstance(entry, kind) for entry in found):
        raise DataError(f'{path} has no list "{key}" of what the data set holds. Save the data set again.')
    return found


def _near(path: str, filesystem: fsspec.AbstractFileSystem) -> str:
    """A sentence with the names in the folder that are most similar to the one asked for."""
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
    if suffix == ".json" and not _is_one_value(name):
        return JsonLinesSource
    return SUFFIXES[suffix]


def _is_one_value(name: str) -> bool:
    """True where a file is one JSON list, or one object around the rows; many .json files are JSON lines."""
    path = local_copy(name)
    refuse_other_kinds(path, file_name(name))
    with path.open("rb") as file:
        start = file.read(FIRST_LINE_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip()
        if b"\n" not in start:  # the whole first line, whatever its length
            start += file.readline()
        has_more = bool(file.read(1))
    if not start.startswith(b"{"):
        return start.startswith(b"[")
    line, line_end, rest = start.partition(b"\n")
    if (rest.strip() or has_more) and line_end:
        return line.rstrip().endswith((b"{", b"[", b",", b":"))  # the value continues after the line
    try:
        row = parse_json(line)
    except ValueError:
        return False
    # One object on one line is a row, unless what it holds is rows.
    return not ({"chosen", "rejected", "chosen_ids"} & row.keys()) and any(
        isinstance(value, list) and value and isinstance(value[0], dict) for value in row.values()
    )


def _suffixes() -> str:
    return ", ".join(SUFFIXES)
