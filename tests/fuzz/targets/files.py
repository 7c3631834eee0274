"""Data files of every suffix: damaged copies of small ones, and structures that their formats do not expect."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
from hypothesis import strategies as st

from easydel.data import UnreadableRow, open_source
from tests.fuzz.inputs import BIG_VALUES, HOSTILE_TEXTS, HOSTILE_VALUES, SEEDS, bent, damaged, json_text, mutate_bytes
from tests.fuzz.made import ROWS

MOST_ROWS = 200
TEXT_ROWS = [{"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in ROWS[:2]]


def read_all(spec: str | Path) -> int:
    """Read a source as training does: in order, past rows that cannot be read, and by number where that works."""
    source = open_source(str(spec))
    rows, good = iter(source), 0
    for _ in range(MOST_ROWS):
        try:
            row = next(rows, None)
        except UnreadableRow:
            continue
        if row is None:
            break
        assert isinstance(row, dict), row
        good += 1
    if source.has_random_access:
        for index in range(min(len(source), 3)):
            try:
                source[index]
            except UnreadableRow:
                source.locate(index)
    return good


def _target(work: Path, suffix: str, contents: st.SearchStrategy[bytes]) -> tuple[Any, Callable[[bytes], Any], bool]:
    path = work / f"rows{suffix}"

    def run(content: bytes) -> Any:
        path.write_bytes(content)
        return read_all(path)

    return contents, run, True


def _lines(rows: list[Any]) -> bytes:
    return "".join(json_text(row) + "\n" for row in rows).encode()


PLAIN_LINES = _lines(ROWS)
ENCODINGS = [
    PLAIN_LINES.decode().encode(name) for name in ("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "cp500", "utf-7")
]
ENCODINGS += [
    "caf\xe9".encode("latin1") + PLAIN_LINES,
    PLAIN_LINES.replace(b"\n", b"\r"),
    PLAIN_LINES.replace(b"\n", b"\r\n"),
]
bent_lines = st.lists(bent(*ROWS) | st.sampled_from([*HOSTILE_VALUES, *BIG_VALUES]), max_size=4).map(_lines)
odd_bytes = st.binary(max_size=40) | st.sampled_from(ENCODINGS)


def json_lines(work: Path) -> Any:
    return _target(work, ".jsonl", damaged(PLAIN_LINES) | bent_lines | odd_bytes)


def json_list(work: Path) -> Any:
    whole = ("[" + ", ".join(map(json_text, ROWS)) + "]").encode()
    structured = bent(ROWS, extra=BIG_VALUES).map(lambda value: json_text(value).encode())
    in_other_encodings = st.sampled_from(
        [whole.decode().encode(name) for name in ("utf-16", "utf-32", "utf-8-sig", "cp500")]
    )
    return _target(work, ".json", damaged(whole) | structured | bent_lines | odd_bytes | in_other_encodings)


def _table(delimiter: str) -> bytes:
    written = io.StringIO()
    table = csv.DictWriter(written, TEXT_ROWS[0], delimiter=delimiter)
    table.writeheader()
    table.writerows([*TEXT_ROWS, dict.fromkeys(TEXT_ROWS[0], 'with "quotes",\nand lines')])
    return written.getvalue().encode()


def _separated(work: Path, delimiter: str, suffix: str) -> Any:
    whole = _table(delimiter)
    cells = st.sampled_from(
        [*(text for text in HOSTILE_TEXTS if text != "\ud800"), '"', '"a', "a\rb", "prompt", "\ufeff", "é"]
    )
    lines = st.lists(cells, max_size=4).map(delimiter.join)
    ends = st.sampled_from(["\n", "\r", "\r\n"])
    structured = st.builds(lambda rows, end: end.join(rows).encode(), st.lists(lines, max_size=4), ends)
    long_field = (whole.decode() + delimiter.join(["a" * 140_000, '"b', "c"]) + "\n").encode()
    encodings = [whole.decode().encode(name) for name in ("utf-16", "utf-32", "utf-8-sig", "cp500")]
    encodings += [whole.replace(b"\r\n", b"\r"), whole.replace(b"\r\n", b"\n"), long_field]
    return _target(work, suffix, damaged(whole) | structured | odd_bytes | st.sampled_from(encodings))


def comma_separated(work: Path) -> Any:
    return _separated(work, ",", ".csv")


def tab_separated(work: Path) -> Any:
    return _separated(work, "\t", ".tsv")


def compressed(work: Path) -> Any:
    """JSON lines in gzip, bzip2 and xz, damaged outside or inside."""
    packers = {".jsonl.gz": gzip.compress, ".jsonl.bz2": bz2.compress, ".jsonl.xz": lzma.compress}
    contents = {suffix: damaged(pack(PLAIN_LINES)) | bent_lines.map(pack) for suffix, pack in packers.items()}
    both = st.one_of(*(st.tuples(st.just(suffix.encode()), content) for suffix, content in contents.items()))

    def run(given: bytes) -> Any:
        suffix, _, content = given.partition(b"\n")
        path = work / f"rows{suffix.decode()}"
        path.write_bytes(content)
        return read_all(path)

    return both.map(b"\n".join), run, True


def _tables() -> list[pa.Table]:
    """Tables of the types that data sets have: text, lists of structures, dictionaries, nulls, long text."""
    text = pa.table({name: [row[name] for row in TEXT_ROWS] for name in TEXT_ROWS[0]})
    chat = pa.Table.from_pylist([ROWS[2], ROWS[2] | {"weight": 0.5}])
    coded = pa.table({name: text[name].dictionary_encode() for name in text.column_names})
    large = pa.table({name: text[name].cast(pa.large_string()) for name in text.column_names})
    others = pa.table(
        {
            "chosen": ["a", None],
            "rejected": pa.array([b"\xff", b"x"]),
            "prompt": pa.array([[1, 2], None]),
            "time": pa.array([2**62, 0], pa.timestamp("us")),
            "decimal": pa.array(["1.5", None]).cast(pa.decimal128(20, 3)),
            "map": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
        }
    )
    return [text, chat, coded, large, others]


def _ipc(table: pa.Table, make: Callable[..., Any], compression: str | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    with make(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        for batch in table.to_batches(max_chunksize=1):
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def arrow(work: Path) -> Any:
    """Arrow IPC files and streams, plain and compressed."""
    seeds = [
        _ipc(table, make, compression)
        for table, make, compression in itertools.product(
            _tables(), (pa.ipc.new_file, pa.ipc.new_stream), (None, "zstd")
        )
    ]
    return _target(work, ".arrow", damaged(*seeds) | st.binary(max_size=40))


def feather(work: Path) -> Any:
    seeds = []
    for table in _tables():
        sink = pa.BufferOutputStream()
        pa.feather.write_feather(table, sink, compression="uncompressed")
        seeds.append(sink.getvalue().to_pybytes())
    return _target(work, ".feather", damaged(*seeds))


def parquet(work: Path) -> Any:
    seeds = []
    for table, compression in itertools.product(_tables(), ("none", "snappy", "zstd")):
        sink = pa.BufferOutputStream()
        pa.parquet.write_table(table, sink, compression=compression, row_group_size=1)
        seeds.append(sink.getvalue().to_pybytes())
    latin1 = pa.table({"prompt": pa.array([b"caf\xe9"]), "chosen": ["a"], "rejected": ["b"]})
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(latin1, sink)
    return _target(work, ".parquet", damaged(*seeds, sink.getvalue().to_pybytes()) | st.binary(max_size=40))


def saved_dataset(work: Path) -> Any:
    """The folder of `Dataset.save_to_disk`, its state.json bent."""
    from datasets import Dataset

    folder = work / "saved"
    Dataset.from_list(TEXT_ROWS).save_to_disk(str(folder))
    state = json.loads((folder / "state.json").read_text())
    splits = {"splits": ["train", "test"]}

    def run(given: dict[str, Any]) -> Any:
        (folder / "dataset_dict.json").unlink(missing_ok=True)
        content = given["content"]
        (folder / given["name"]).write_bytes(bytes.fromhex(content) if given["raw"] else json_text(content).encode())
        return read_all(folder)

    raw = st.builds(mutate_bytes, st.just(json.dumps(state).encode()), SEEDS).map(bytes.hex)
    return st.one_of(
        st.fixed_dictionaries({"name": st.just("state.json"), "raw": st.just(False), "content": bent(state)}),
        st.fixed_dictionaries({"name": st.just("state.json"), "raw": st.just(True), "content": raw}),
        st.fixed_dictionaries({"name": st.just("dataset_dict.json"), "raw": st.just(False), "content": bent(splits)}),
    ), run
