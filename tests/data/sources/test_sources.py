"""Sources read the same rows whatever the format, by number and in order, and say where a row is."""

import bz2
import contextlib
import csv
import gzip
import json
import lzma
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import datasets
import fsspec
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from easydel.data.faults import DataError, UnreadableRow
from easydel.data.sources import byte_index, text_files
from easydel.data.sources import files as file_sources
from easydel.data.sources.arrow_files import ParquetFile
from easydel.data.sources.base import CompositeSource, ShardedDataSource
from easydel.data.sources.files import CompressedJsonLinesSource, CsvSource, JsonLinesSource, JsonSource, ParquetSource
from easydel.data.sources.huggingface import HuggingFaceSource
from easydel.data.sources.open_source import open_source

ROWS = [
    {"prompt": f'question {n}\nin two lines, with "quotes"', "chosen": "é🎈\u2028 " * n + "yes", "rejected": "no"}
    for n in range(7)
]


def write_jsonl(path, rows=ROWS, newline="\n"):
    path.write_bytes(newline.join(json.dumps(row, ensure_ascii=False) for row in rows).encode())


def write_json(path):
    path.write_text(json.dumps(ROWS, indent=1))


def write_csv(path, delimiter=","):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path):
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=3)


def write_arrow_file(path):
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def write_arrow_stream(path):
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS = {
    "a.jsonl": write_jsonl,
    "b.json": write_json,
    "lines.json": write_jsonl,
    "c.csv": write_csv,
    "d.tsv": lambda path: write_csv(path, "\t"),
    "e.parquet": write_parquet,
    "f.arrow": write_arrow_file,
    "g.arrow": write_arrow_stream,
}


@pytest.fixture(params=WRITERS)
def source(request, tmp_path):
    """Each format with the same rows."""
    path = tmp_path / request.param
    WRITERS[request.param](path)
    return open_source(path)


def test_every_format_gives_its_rows_in_order_and_by_number(source):
    assert list(source) == ROWS
    assert source.has_random_access and len(source) == len(ROWS)
    assert [source[n] for n in (6, 0, 3, -1)] == [ROWS[6], ROWS[0], ROWS[3], ROWS[6]]
    with pytest.raises(IndexError):
        source[len(ROWS)]


def test_every_format_starts_at_any_row(source):
    (name,) = source.shard_names
    for row in range(len(ROWS) + 2):
        assert list(source.open_shard_at_row(name, row)) == ROWS[row:]


def test_a_row_is_located_by_file_and_number_from_0(source):
    assert source.locate(5) == f"{source.shard_names[0].rsplit('/')[-1]}, row 5"


def test_every_format_can_be_read_on_several_threads(source):
    barrier = threading.Barrier(4)

    def read(thread):
        barrier.wait()
        return [source[n] for n in range(len(ROWS))]

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(read, range(4))) == [ROWS] * 4


# JSON lines


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n", "\n  \n\t\n"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n "])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\n \n"])
def test_json_lines_forgive_blank_lines_and_byte_order_marks(tmp_path, newline, end, start):
    path = tmp_path / "a.jsonl"
    path.write_bytes(start + (newline.join(map(json.dumps, ROWS)) + end).encode())
    source = JsonLinesSource(path)
    assert len(source) == len(ROWS)
    assert [source[n] for n in range(len(source))] == ROWS == list(source)


@pytest.mark.parametrize("content", ["", "\n", " \n \n", "\ufeff"])
def test_an_empty_file_has_no_rows(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    assert len(JsonLinesSource(path)) == 0
    assert list(JsonLinesSource(path)) == []


@pytest.mark.parametrize(("broken", "words"), [('{"a": 1', "not JSON"), ("[1]", "list [1]"), ("\udce9", "not JSON")])
def test_a_broken_line_is_named_by_file_and_line(tmp_path, broken, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(f'{{"a": 0}}\n\n{broken}\n{{"a": 2}}\n'.encode(errors="surrogateescape"))
    source = JsonLinesSource(path)
    assert source[2] == {"a": 2}
    for read in (lambda: source[1], lambda: list(source)):
        with pytest.raises(DataError, match=r"a\.jsonl, line 3") as caught:
            read()
        assert words in str(caught.value)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_the_index_does_not_depend_on_where_the_file_is_cut_into_chunks(tmp_path, monkeypatch, chunk):
    write_jsonl(tmp_path / "a.jsonl")
    write_csv(tmp_path / "a.csv")
    monkeypatch.setattr(byte_index, "CHUNK_BYTES", chunk)
    assert list(JsonLinesSource(tmp_path / "a.jsonl")) == ROWS
    assert list(CsvSource(tmp_path / "a.csv")) == ROWS


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.fixed_dictionaries({"a": st.text(max_size=9), "b": st.text(max_size=9)}), min_size=1, max_size=6))
def test_any_text_comes_back_from_json_lines_and_csv(tmp_path, rows):
    rows = [{key: value.encode("utf-8", "replace").decode() for key, value in row.items()} for row in rows]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert list(JsonLinesSource(tmp_path / "a.jsonl")) == rows
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["a", "b"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    source = CsvSource(tmp_path / "a.csv")
    assert [source[n] for n in range(len(source))] == rows


def test_compressed_json_lines_are_read_in_order_only(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    source = open_source(tmp_path / "a.jsonl.gz")
    assert isinstance(source, CompressedJsonLinesSource)
    assert list(source) == ROWS
    assert not source.has_random_access
    assert source.locate(3) == "a.jsonl.gz, row 3"
    with pytest.raises(TypeError):
        len(source)
    with pytest.raises(TypeError):
        source[0]


def test_a_json_file_that_is_no_list_of_objects_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1}, 2]')
    with pytest.raises(DataError, match=r"a\.json, row 1 is int 2"):
        list(open_source(tmp_path / "a.json"))
    (tmp_path / "b.json").write_text('{"a": {"b": 1}}')
    with pytest.raises(DataError, match=r"b\.json holds dict"):
        list(JsonSource(tmp_path / "b.json"))


DEEP = '{"a": ' * 5000 + "1" + "}" * 5000


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (DEEP, "it is nested too deeply"),
        ("[" * 100_000, "it is nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "is not JSON: Exceeds the limit"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' comes twice in one object"),
        ('{"a": [{"b": 1, "b": 1}]}', "the key 'b' comes twice in one object"),
        ('{"a": "\0"}', "Invalid control character"),
        ('{"a": 1}\r{"a": 2}', "Extra data"),
    ],
)
def test_a_hostile_json_line_is_a_bad_row_and_the_others_stay(tmp_path, line, words):
    (tmp_path / "a.jsonl").write_text(f'{{"a": 0}}\n{line}\n{{"a": 2}}\n', newline="")
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write((tmp_path / "a.jsonl").read_bytes())
    for name in ("a.jsonl", "a.jsonl.gz"):
        rows = iter(open_source(tmp_path / name))
        assert next(rows) == {"a": 0}
        with pytest.raises(UnreadableRow, match=rf"a\.jsonl.*, line 2 .*{words}") as caught:
            next(rows)
        assert len(str(caught.value)) < 400
        assert next(rows) == {"a": 2}


def test_numbers_of_many_digits_stay_what_they_are(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": ' + "7" * 400 + ', "b": 1e400, "c": NaN}\n')
    row = open_source(tmp_path / "a.jsonl")[0]
    assert row["a"] == int("7" * 400) and row["b"] == float("inf") and row["c"] != row["c"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a": "b"}\n'.encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        ('{"a": "b"}\n'.encode("utf-16-le"), "is UTF-16 text; save it as UTF-8"),
        ('{"a": "b"}\n'.encode("utf-32-be"), "is UTF-32 text; save it as UTF-8"),
        (gzip.compress(b'{"a": "b"}', mtime=0), "is gzip-compressed; name it by what it is"),
        (b"PK\x03\x04....", "is a zip archive"),
        (b"PAR1....PAR1", "is a Parquet file"),
        (b" \n<!DOCTYPE html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_a_text_file_that_is_something_else_is_named_by_what_it_is(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} {words}"):
        open_source(tmp_path / name)[0]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("filler", [0, 2**20])  # a line may be longer than what is read at first
def test_rows_under_a_key_of_one_object_are_named_with_the_fix(tmp_path, indent, filler):
    rows = [{"text": "a" * filler}, *ROWS]
    (tmp_path / "a.json").write_text(json.dumps({"version": "1", "data": rows}, indent=indent))
    with pytest.raises(DataError, match=r'a\.json holds dict.*the rows seem to be under "data": write that list alone'):
        open_source(tmp_path / "a.json")[0]
    (tmp_path / "b.json").write_text(json.dumps(ROWS[0]))
    assert list(open_source(tmp_path / "b.json")) == ROWS[:1]
    (tmp_path / "c.json").write_text("\n".join(json.dumps(row) for row in rows))
    assert list(open_source(tmp_path / "c.json")) == rows


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.arrow", "a.jsonl.gz"])
def test_a_pipe_is_refused_and_never_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=f"{name} is a pipe or a device, expected a file"):
        next(iter(open_source(tmp_path / name)))


def test_a_folder_with_the_name_of_a_file_is_opened_as_a_folder(tmp_path):
    (tmp_path / "a.jsonl" / "b.jsonl").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="holds no file that ends in"):
        open_source(tmp_path / "a.jsonl")


def test_a_line_too_long_to_be_a_row_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "LONGEST_RECORD", 100)
    monkeypatch.setattr(file_sources, "LONGEST_RECORD", 100)
    lines = '{"a": 0}\n{"a": "' + "x" * 200 + '"}\n'
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.csv").write_text("a,b\n1," + "x" * 200 + "\n")
    for name, row, line in (("a.jsonl", 1, 2), ("a.csv", 0, 2)):
        with pytest.raises(UnreadableRow, match=f"{name}, line {line} .*more than 100 bytes"):
            open_source(tmp_path / name)[row]
    with pytest.raises(DataError, match=r"a\.jsonl\.gz, line 2 has more than 100 bytes"):
        list(open_source(tmp_path / "a.jsonl.gz"))


# CSV, Parquet, Arrow


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a,b\rx,y\rz,w\r", "a.csv, line 1: a lone carriage return"),
        ("a,b\rc\nx,y\n", "a.csv, line 1: a lone carriage return"),
        ("a;b\nx;y\n", "its columns seem to be separated by semicolons, expected commas"),
        ("a\tb\nx\ty\n", "its columns seem to be separated by tabs, expected commas"),
        ("a,b,a\nx,y,z\n", 'names a column twice in its first line: "a", "b", "a"'),
        (
            'a,b\nx,"y\n' + "z,w\n" * 99,
            "a.csv, line 2: a double quote is opened and never closed, so this row takes in 100 lines",
        ),
    ],
)
def test_a_csv_file_of_another_shape_is_refused(tmp_path, content, words):
    (tmp_path / "a.csv").write_text(content, newline="")
    source = open_source(tmp_path / "a.csv")
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            source[0]
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", []),
        ("a,b\n", []),
        ("a,b\r\nx,y\r\n", [{"a": "x", "b": "y"}]),
        ("\ufeffa,b\nx,y", [{"a": "x", "b": "y"}]),
        (",a\n0,x\n", [{"": "0", "a": "x"}]),
        ('a,b\n"x\ry",z\n', [{"a": "x\ry", "b": "z"}]),
        ("a,b\nx\0,y\n", [{"a": "x\0", "b": "y"}]),
        ("a\nx;y\n", [{"a": "x;y"}]),
    ],
)
def test_odd_but_good_csv_files_are_read(tmp_path, content, expected):
    (tmp_path / "a.csv").write_text(content, newline="")
    assert list(open_source(tmp_path / "a.csv")) == expected


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("x\ry,z", "it holds a lone carriage return outside quotes"),
        ('x",y\n1,2\n3",4', "a double quote makes it take in 3 lines"),
        ('"x,y\n1,2\n3",4,5', "has 3 fields, expected the 2 of the header; a double quote makes it take in 3 lines"),
    ],
)
def test_a_bad_csv_row_says_what_is_wrong(tmp_path, line, words):
    (tmp_path / "a.csv").write_text(f"a,b\n{line}\n5,6\n", newline="")
    source = open_source(tmp_path / "a.csv")
    with pytest.raises(UnreadableRow, match=r"a\.csv, line 2 ") as caught:
        source[0]
    assert words in str(caught.value)
    assert source[1] == {"a": "5", "b": "6"}


def test_a_csv_row_with_too_few_fields_is_named_by_its_line(tmp_path):
    (tmp_path / "a.csv").write_text('a,b\n1,"x\ny"\n2\n')
    source = open_source(tmp_path / "a.csv")
    assert source[0] == {"a": "1", "b": "x\ny"}
    with pytest.raises(DataError, match=r"a\.csv, line 4 has 1 fields, expected the 2"):
        source[1]


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_a_csv_field_may_be_of_any_length(tmp_path, delimiter):
    limit = csv.field_size_limit()
    path = tmp_path / ("a.csv" if delimiter == "," else "a.tsv")
    rows = [
        {"a": "é, \t" * 200_000, "b": 'with "quotes"\nand lines', "c": ""},
        {"a": "12", "b": "null", "c": "1e5"},
        {"a": "", "b": "NA", "c": "x" * (limit + 1)},
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    source = open_source(path)
    assert list(source) == rows == [source[n] for n in range(3)]
    assert csv.field_size_limit() == limit


def test_a_csv_file_in_latin_1_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("prömpt,chosen\nä,b\n", encoding="latin-1")
    with pytest.raises(DataError, match=r"a\.csv: the first line.*is not UTF-8 text.*Save the file as UTF-8"):
        list(open_source(tmp_path / "a.csv"))
    (tmp_path / "b.csv").write_bytes("prompt,chosen\nä,b\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"b\.csv, line 2 cannot be read"):
        list(open_source(tmp_path / "b.csv"))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("content", [b"", b"not that format at all"])
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        open_source(tmp_path / name)[0]


def test_only_the_row_groups_asked_for_are_copied_and_the_copies_go_with_the_source(tmp_path):
    write_parquet(tmp_path / "a.parquet")  # three rows a group
    file = ParquetFile(tmp_path / "a.parquet", "a.parquet")
    assert list(file.rows_from(0)) == ROWS
    assert not file.copies
    assert [file.row(n) for n in (1, 6, 2)] == [ROWS[1], ROWS[6], ROWS[2]]
    assert file.copies.keys() == {0, 2}
    copy = file.copies[0].path
    assert copy.exists()
    del file
    assert not copy.exists()


def damage(path, start, size=200):
    content = bytearray(path.read_bytes())
    content[start : start + size] = bytes(255 - byte for byte in content[start : start + size])
    path.write_bytes(content)


LONG = [{"text": f"{n} " + "".join(chr(97 + (n * m) % 26) for m in range(900))} for n in range(3000)]


def test_damaged_pages_of_a_parquet_file_are_an_error_with_its_name(tmp_path):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(LONG), path, row_group_size=1000, use_dictionary=False)
    damage(path, path.stat().st_size // 2)
    source = ParquetSource(path)
    for read in (lambda: list(source), lambda: source[1500], lambda: list(source.open_shard_at_row(str(path), 10))):
        with pytest.raises(DataError, match=r"a\.parquet .*damaged.*snappy"):
            read()


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
def test_an_arrow_file_that_was_cut_short_is_an_error_with_its_name(tmp_path, new):
    path, table = tmp_path / "a.arrow", pa.Table.from_pylist(LONG)
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"a\.arrow .*cut short"):
        open_source(path)[0]


@pytest.mark.parametrize(("suffix", "module"), [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
@pytest.mark.parametrize("how", ["cut short", "damaged", "not packed"])
def test_a_compressed_file_that_cannot_be_unpacked_is_an_error_with_its_name(tmp_path, suffix, module, how):
    path = tmp_path / f"a.jsonl.{suffix}"
    with module.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in LONG)
    if how == "cut short":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "damaged":
        damage(path, path.stat().st_size // 2)
    else:
        write_jsonl(path)
    rows = iter(open_source(path))
    with pytest.raises(DataError, match=rf"a\.jsonl\.{suffix} is damaged or was cut short"):
        while True:
            # gzip looks at its checksum only at the end; until then damage shows as lines that are not JSON.
            with contextlib.suppress(UnreadableRow):
                next(rows)


def test_an_unsupported_compression_is_answered_with_the_known_ones(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst has no known suffix; expected one of .*\.jsonl\.gz"):
        open_source(tmp_path / "a.jsonl.zst")


def test_nested_messages_survive_parquet(tmp_path):
    rows = [{"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(open_source(tmp_path / "a.parquet")) == rows


# Hugging Face


def test_a_dataset_is_read_by_number_and_a_stream_in_order(tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    source = HuggingFaceSource(dataset)
    assert len(source) == 7 and source[4] == ROWS[4] and list(source) == ROWS
    assert list(source.open_shard_at_row(source.shard_names[0], 5)) == ROWS[5:]
    stream = HuggingFaceSource(dataset.to_iterable_dataset())
    assert list(stream) == ROWS and not stream.has_random_access
    assert list(stream.open_shard_at_row(stream.shard_names[0], 5)) == ROWS[5:]
    assert stream.locate(5) == "dataset, row 5"


def test_a_shuffled_dataset_saved_to_disk_comes_back_in_its_order(tmp_path):
    dataset = datasets.Dataset.from_list(ROWS).shuffle(seed=1)
    dataset.save_to_disk(tmp_path / "saved", num_shards=2)
    source = open_source(tmp_path / "saved")
    assert list(source) == list(dataset)
    assert source.num_shards() == 2 and source[6] == dataset[6]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("state.json", {"_data_files": [{"filename": "../a.arrow"}]}, "which is no file beside it"),
        ("state.json", {"_data_files": [{"filename": "/etc/passwd"}]}, "which is no file beside it"),
        ("state.json", {"_data_files": [{"filename": "gone.arrow"}]}, "which is no file beside it"),
        ("state.json", {"_data_files": [{"filename": ["a"]}]}, "which is no file beside it"),
        ("state.json", {"_data_files": "a.arrow"}, 'has no list "_data_files"'),
        ("state.json", [], 'has no list "_data_files"'),
        ("state.json", None, "is nested too deeply"),
        ("dataset_dict.json", {"splits": []}, 'has no list "splits"'),
        ("dataset_dict.json", {"splits": [{}]}, 'has no list "splits"'),
    ],
)
def test_a_hostile_saved_dataset_leads_nowhere(tmp_path, name, content, words):
    folder = tmp_path / "saved"
    folder.mkdir()
    write_arrow_file(tmp_path / "a.arrow")
    (folder / name).write_text(json.dumps(content) if content is not None else "[" * 100_000)
    with pytest.raises(DataError, match=f"{name}.*{words}"):
        open_source(folder)


def test_a_dict_of_splits_is_refused_by_name(tmp_path):
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS))
    with pytest.raises(TypeError, match="train, test"):
        HuggingFaceSource(splits)
    splits.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match='splits "train", "test"; give the folder of one, such as .*/train'):
        open_source(tmp_path / "saved")
    assert list(open_source(tmp_path / "saved" / "test")) == ROWS
    with pytest.raises(TypeError, match="list"):
        HuggingFaceSource(ROWS)


# Views and composites


def numbers(tmp_path, name, start, stop):
    write_jsonl(tmp_path / name, [{"n": n, "half": n / 2} for n in range(start, stop)])
    return JsonLinesSource(tmp_path / name)


def test_a_composite_goes_through_its_sources_in_turn(tmp_path):
    source = CompositeSource([numbers(tmp_path, "a.jsonl", 0, 3), numbers(tmp_path, "b.jsonl", 3, 5)])
    assert [row["n"] for row in source] == [0, 1, 2, 3, 4] == [source[n]["n"] for n in range(len(source))]
    assert [source.locate(n) for n in (2, 3)] == ["a.jsonl, row 2", "b.jsonl, row 0"]
    assert source.num_shards() == 2


def test_a_composite_may_hold_the_same_source_twice(tmp_path):
    one = numbers(tmp_path, "a.jsonl", 0, 2)
    source = CompositeSource([one, one])
    assert [row["n"] for row in source] == [0, 1, 0, 1]
    assert len(set(source.shard_names)) == 2


def test_maps_are_lazy_and_keep_random_access(tmp_path):
    seen = []

    def double(row):
        seen.append(row["n"])
        return {"n": 2 * row["n"]}

    source = numbers(tmp_path, "a.jsonl", 0, 5).map(double)
    assert seen == [] and len(source) == 5
    assert source[3] == {"n": 6} and seen == [3]
    assert source.locate(3) == "a.jsonl, row 3"
    assert next(source.open_shard_at_row(source.shard_names[0], 4)) == {"n": 8} and seen == [3, 4]


def test_filters_and_transforms_are_read_in_order(tmp_path):
    odd = numbers(tmp_path, "a.jsonl", 0, 6).filter(lambda row: row["n"] % 2)
    assert [row["n"] for row in odd] == [1, 3, 5]
    assert [row["n"] for row in odd.open_shard_at_row(odd.shard_names[0], 1)] == [3, 5]
    assert not odd.has_random_access
    assert odd.locate(1) == "a.jsonl (filtered or transformed), row 1"

    def pairs(rows):
        for row in rows:
            yield {"pair": (row["n"], next(rows)["n"])}

    assert [row["pair"] for row in numbers(tmp_path, "b.jsonl", 0, 4).transform(pairs)] == [(0, 1), (2, 3)]


def test_fields_are_renamed_and_selected(tmp_path):
    source = numbers(tmp_path, "a.jsonl", 3, 4)
    assert source.rename_fields({"n": "number"})[0] == {"half": 1.5, "number": 3}
    assert source.rename_fields({"n": "half", "half": "n"})[0] == {"half": 3, "n": 1.5}
    assert source.select_fields(["half"])[0] == {"half": 1.5}
    with pytest.raises(DataError, match='"m"; its fields are n, half'):
        source.rename_fields({"m": "prompt"})[0]
    with pytest.raises(DataError, match="overwrite"):
        source.rename_fields({"n": "half"})[0]


def test_a_source_of_ones_own_needs_two_methods():
    class Count(ShardedDataSource):
        shard_names = ("small", "large")

        def open_shard(self, name):
            return iter([{"n": n} for n in range({"small": 2, "large": 4}[name])])

    source = Count()
    assert [row["n"] for row in source.map(lambda row: row)] == [0, 1, 0, 1, 2, 3]
    assert list(source.open_shard_at_row("large", 3)) == [{"n": 3}]
    assert source.locate(4) == "row 4"
    with pytest.raises(TypeError, match="small"):
        len(source)


# Opening by name


def test_globs_folders_lists_and_urls_name_files(tmp_path):
    for name in ("b", "a"):
        write_jsonl(tmp_path / f"{name}.jsonl")
    write_parquet(tmp_path / "c.parquet")
    (tmp_path / "README.md").write_text("about")
    for spec, files in (
        (str(tmp_path / "*.jsonl"), ["a.jsonl", "b.jsonl"]),
        (tmp_path, ["a.jsonl", "b.jsonl", "c.parquet"]),
        ([tmp_path / "c.parquet", str(tmp_path / "a.jsonl")], ["c.parquet", "a.jsonl"]),
        (f"file://{tmp_path}/b.jsonl", ["b.jsonl"]),
    ):
        source = open_source(spec)
        assert [name.rsplit("/", 1)[-1] for name in source.shard_names] == files
        assert len(source) == len(files) * len(ROWS)
        assert source.locate(len(ROWS) - 1) == f"{files[0]}, row 6"


def test_files_of_one_name_in_two_folders_are_told_apart(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "a.jsonl")
    source = open_source([tmp_path / "one" / "a.jsonl", tmp_path / "two" / "a.jsonl"])
    assert source.locate(7) == f"{tmp_path}/two/a.jsonl, row 0"


def test_remote_files_are_read_like_local_ones(tmp_path):
    memory = fsspec.filesystem("memory")
    for name, writer in WRITERS.items():
        writer(tmp_path / name)
        memory.pipe_file(f"/sources/{name}", (tmp_path / name).read_bytes())
    for name in WRITERS:
        source = open_source(f"memory://sources/{name}")
        assert list(source) == ROWS and source[2] == ROWS[2]
        assert source.locate(2) == f"{name}, row 2"
    assert len(open_source("memory://sources/*.arrow")) == 2 * len(ROWS)
    assert len(open_source("memory://sources")) == len(WRITERS) * len(ROWS)


def test_a_missing_file_is_answered_with_the_nearest_names(tmp_path):
    write_jsonl(tmp_path / "train.jsonl")
    with pytest.raises(FileNotFoundError, match=r"trian\.jsonl\. The folder has train\.jsonl"):
        open_source(tmp_path / "trian.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no file matches .*\*\.parquet\. The folder has train\.jsonl"):
        open_source(str(tmp_path / "*.parquet"))
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere either"):
        open_source(tmp_path / "nowhere" / "train.jsonl")


def test_an_unknown_suffix_is_answered_with_the_known_ones(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a\.txt has no known suffix; expected one of \.jsonl, .*\.parquet"):
        open_source(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="no files were named"):
        open_source([])
    with pytest.raises(ValueError, match="given twice"):
        write_jsonl(tmp_path / "a.jsonl")
        open_source([tmp_path / "a.jsonl"] * 2)
