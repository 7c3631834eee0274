"""No damage to a binary file, whatever it is, ends in more than an error of ours: each input is read in a child."""

from __future__ import annotations

import gzip
import pickle
import random
import subprocess
import sys
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest

from easydel.data.faults import DataError, UnreadableRow
from easydel.data.sources.open_source import open_source

ROWS = [
    {
        "prompt": f"question {n} é" if n % 5 else None,
        "chosen": [{"role": "user", "content": f"a{n}"}, {"role": "assistant", "content": "b" * n}],
        "rejected": "no " * (n % 4),
        "kind": ("red", "green", "blue")[n % 3],
        "scores": [n / 7] * (n % 3),
        "weight": n / 3 if n % 2 else None,
        "flag": n % 2 == 0,
        "meta": [("tone", "kind"), ("n", str(n))],
    }
    for n in range(40)
]
SCHEMA = pa.schema(
    {
        "prompt": pa.string(),
        "chosen": pa.list_(pa.struct({"role": pa.string(), "content": pa.large_string()})),
        "rejected": pa.string(),
        "kind": pa.dictionary(pa.int8(), pa.string()),
        "scores": pa.list_(pa.float32()),
        "weight": pa.float64(),
        "flag": pa.bool_(),
        "meta": pa.map_(pa.string(), pa.string()),
    }
)
READ_BACK = [row | {"meta": dict(row["meta"])} for row in pa.Table.from_pylist(ROWS, SCHEMA).to_pylist()]


def arrow(new, compression=None):
    def write(path: Path) -> None:
        table, options = pa.Table.from_pylist(ROWS, SCHEMA), pa.ipc.IpcWriteOptions(compression=compression)
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=13)

    return write


def parquet(**options):
    return lambda path: pa.parquet.write_table(
        pa.Table.from_pylist(ROWS, SCHEMA), path, row_group_size=17, data_page_size=64, **options
    )


FORMATS = {
    "file.arrow": arrow(pa.ipc.new_file),
    "stream.arrow": arrow(pa.ipc.new_stream),
    "lz4.feather": arrow(pa.ipc.new_file, "lz4"),
    "zstd.arrow": arrow(pa.ipc.new_stream, "zstd"),
    "plain.parquet": parquet(use_dictionary=False, compression="none"),
    "snappy.parquet": parquet(),
    "zstd.parquet": parquet(compression="zstd", data_page_version="2.0"),
    "delta.parquet": parquet(
        use_dictionary=False,
        compression="none",
        column_encoding={
            "prompt": "DELTA_BYTE_ARRAY", "rejected": "DELTA_LENGTH_BYTE_ARRAY", "weight": "BYTE_STREAM_SPLIT",
        },
    ),
}  # fmt: skip


def mutated(content: bytes, seed: int) -> bytes:
    """One of the many ways in which a file may be damaged."""
    choice, damaged = random.Random(seed), bytearray(content)
    for _ in range(choice.choice([1, 1, 2, 4, 16])):
        place, size = choice.randrange(len(damaged)), choice.choice([1, 4, 8, 64, 512])
        other = choice.randrange(len(damaged))
        match choice.randrange(8):
            case 0 | 1:
                damaged[place] ^= 1 << choice.randrange(8)
            case 2:
                damaged[place : place + 1] = choice.choice([b"\x00", b"\xff", b"\x7f", b"\x80"])
            case 3:
                number = choice.choice([-1, 0, 1 << 31, (1 << 31) - 1, 1 << 40, (1 << 63) - 1, -(1 << 63), 65536])
                damaged[place : place + 8] = (number % (1 << 64)).to_bytes(8, "little")
            case 4:
                damaged[place : place + size] = damaged[other : other + size]
            case 5:
                damaged[place : place + size] = bytes(min(size, len(damaged) - place))
            case 6:
                del damaged[place : place + size]
            case 7:
                damaged[place:place] = damaged[other : other + size]
    if choice.random() < 0.05:
        del damaged[choice.randrange(len(damaged)) :]
    return bytes(damaged) or b"\x00"


# Reads one input after the other, says the seed of each before, and stops at what is not allowed.
READER = """
import resource, signal, sys
from pathlib import Path
from tests.data.sources.test_damaged_files import mutated, read_all
whole, first, last, path = Path(sys.argv[1]).read_bytes(), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
for seed in range(first, last):
    print(seed, flush=True)
    path.write_bytes(mutated(whole, seed))
    signal.alarm(10)
    read_all(path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if peak > 2048:
        raise MemoryError(f"{peak} MiB")
"""


def read_all(path: Path) -> str:
    """Read a file by number and in order, and say how it went; anything but an error of ours goes through."""
    try:
        source = open_source(path)
        rows = min(len(source), 200)
        for number in (0, rows - 1, rows // 2) if rows else ():
            try:
                source[number]
            except UnreadableRow as error:
                assert len(str(error)) < 600, error
        in_order = iter(source)
        for _ in range(200):
            try:
                repr(next(in_order))
            except UnreadableRow:
                continue
            except StopIteration:
                break
    except DataError as error:
        assert path.name in str(error) and len(str(error)) < 600, error
        return "refused"
    return "read"


def breakdowns(name: str, folder: Path, seeds: range) -> dict[int, str]:
    """What went wrong, by seed."""
    whole, path, found = folder / f"whole-{name}", folder / name, {}
    FORMATS[name](whole)
    first = seeds.start
    while first < seeds.stop:
        command = [sys.executable, "-c", READER, str(whole), str(first), str(seeds.stop), str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            break
        seed = int(done.stdout.splitlines()[-1])
        found[seed] = f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
        first = seed + 1
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_every_encoding_is_read_as_it_was_written(tmp_path, name):
    FORMATS[name](tmp_path / name)
    source = open_source(tmp_path / name)
    assert list(source) == READ_BACK == [source[n] for n in range(len(source))]


@pytest.mark.parametrize("name", FORMATS)
def test_damage_is_read_or_refused(tmp_path, name):
    assert not breakdowns(name, tmp_path, range(60))


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_much_damage_is_read_or_refused(tmp_path, name):
    assert not breakdowns(name, tmp_path, range(5000))


def column(path: Path, values: pa.Array) -> list:
    """What comes back of a column, read in order and by number; the errors of rows as they are worded."""
    table = pa.table({"a": values})
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path)
    else:
        pa.feather.write_feather(table, str(path))
    source = open_source(path)

    def attempt(read):
        try:
            return read()["a"]
        except UnreadableRow as error:
            return str(error)

    rows = iter(source)
    in_order = [attempt(lambda: next(rows)) for _ in range(len(source))]
    assert in_order == [attempt(lambda number=number: source[number]) for number in range(len(source))]
    return in_order


@pytest.mark.parametrize("name", ["a.parquet", "a.feather"])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([Decimal("1.25")]), [Decimal("1.25")]),
        (pa.array([b"\xff\x00"], pa.binary()), [b"\xff\x00"]),
        (pa.array(["a", None, "a"]).dictionary_encode(), ["a", None, "a"]),
        (pa.array([[("k", [("j", 1)])]], pa.map_(pa.string(), pa.map_(pa.string(), pa.int8()))), [{"k": {"j": 1}}]),
        (pa.array([0], pa.timestamp("us")), [datetime(1970, 1, 1)]),
        (pa.array(["x" * 40, "y"], pa.string_view()), ["x" * 40, "y"]),
        (pa.nulls(2), [None, None]),
    ],
)
def test_values_of_every_type_come_back_as_python_holds_them(tmp_path, name, values, expected):
    assert column(tmp_path / name, values) == expected


@pytest.mark.parametrize("name", ["a.parquet", "a.feather"])
@pytest.mark.parametrize(
    ("values", "words"),
    [
        (pa.array([0, 1 << 62], pa.timestamp("us")), "of type timestamp[us] cannot be read: date value out of range"),
        (pa.array([0, 1 << 62], pa.duration("s")), "of type duration[s] cannot be read"),
        (pa.array([[], [("k", 1), ("k", 2)]], pa.map_(pa.string(), pa.int8())), "duplicate key was 'k'"),
        (pa.array([b"fine", b"caf\xe9"]).view(pa.string()), "holds text that is not UTF-8"),
        (pa.array([[b"fine"], [b"caf\xe9"]]).view(pa.list_(pa.string())), "holds text that is not UTF-8"),
    ],
)
def test_a_value_that_python_cannot_hold_is_a_bad_row(tmp_path, name, values, words):
    good, bad = column(tmp_path / name, values)
    assert good in (datetime(1970, 1, 1), timedelta(0), {}, "fine", ["fine"])
    assert bad.startswith(f'{name}, row 1: column "a" ') and words in bad


@pytest.mark.parametrize("name", ["a.parquet", "a.feather"])
def test_a_column_that_comes_twice_is_refused(tmp_path, name):
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    pa.feather.write_feather(table, str(tmp_path / "a.feather"))
    with pytest.raises(DataError, match=rf'{name} names the column or field "a" twice'):
        open_source(tmp_path / name)[0]


@pytest.mark.parametrize("name", ["a.parquet", "a.feather"])
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path, name):
    table = pa.table({"a": pa.array(["a" * (300 << 20)], pa.large_string())})
    pa.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    pa.feather.write_feather(table, str(tmp_path / "a.feather"), compression="zstd")
    del table
    before = pa.total_allocated_bytes()
    with pytest.raises(DataError, match=rf"{name} has \d+ bytes and unpacks to 3145\d+"):
        open_source(tmp_path / name)[0]
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_a_parquet_file_whose_runs_unpack_to_a_bomb_is_refused(tmp_path):
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array(["x" * 100_000]))
    pa.parquet.write_table(pa.table({"a": repeated}), tmp_path / "a.parquet", store_schema=False)
    with pytest.raises(DataError, match="decompression bomb"):
        open_source(tmp_path / "a.parquet")[0]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.parquet", gzip.compress(b"x", mtime=0), "is gzip-compressed, not a Parquet file"),
        ("a.arrow", b"PAR1....PAR1", "is a Parquet file, not an Arrow file"),
        ("a.arrow", pickle.dumps([{"a": 1}]), "is a Python pickle, which is never opened"),
        ("a.parquet", b"<!DOCTYPE html><html>", "is a web page"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "is a Git LFS pointer"),
        ("a.parquet", b"\x93NUMPY\x01\x00v\x00{'descr': '|O'", "is a NumPy array"),
    ],
)
def test_a_file_of_another_format_is_named_by_what_it_is(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} {words}"):
        open_source(tmp_path / name)[0]
