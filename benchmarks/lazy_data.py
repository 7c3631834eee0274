"""Lazy preparation of preference data beside `datasets.map`: time to the first batch, total time, memory.

    python -m benchmarks.lazy_data

Every measurement is a process of its own, which has its imports and its tokenizer before the clock starts. All of them
shuffle, apply the chat template, tokenise prompt and completions, and make batches of 32 pairs; the peers do it with
`Dataset.map` (all rows first, as trainers commonly do) and `IterableDataset.map` on an Arrow file, which is the format
that suits them best.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).parents[1]
REAL_ROWS = ROOT / "../shared/data/pandalm_human.jsonl"
BATCH_SIZE = 32
SEED = 0
LENGTHS = {"prompt": 200, "chosen": 300, "rejected": 300}
Batches = Iterable[object]


def write_files(folder: Path, rows: int) -> None:
    """The same chat rows as JSON lines, Arrow and Parquet."""
    import pyarrow as pa
    import pyarrow.parquet

    text = REAL_ROWS.read_text() if REAL_ROWS.is_file() else "How do I boil an egg? Eight minutes will do. " * 2000
    random = np.random.default_rng(SEED)
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}

    def message(field: str) -> list[dict[str, str]]:
        start = int(random.integers(len(text) - LENGTHS[field]))
        return [{"role": roles[field], "content": text[start : start + LENGTHS[field]]}]

    role_and_content = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    schema = pa.schema(dict.fromkeys(LENGTHS, role_and_content))
    with (
        (folder / "rows.jsonl").open("w") as lines,
        pa.OSFile(str(folder / "rows.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as arrow,
        pyarrow.parquet.ParquetWriter(folder / "rows.parquet", schema) as parquet,
    ):
        for start in range(0, rows, 10_000):
            chunk = [{field: message(field) for field in LENGTHS} for _ in range(min(10_000, rows - start))]
            lines.writelines(json.dumps(row) + "\n" for row in chunk)
            table = pa.Table.from_pylist(chunk, schema)
            arrow.write_table(table, max_chunksize=1000)
            parquet.write_table(table)


def load_tokenizer():
    from easydel.infra.download import smollm2_135m_instruct
    from easydel.weights.gguf.tokenizer import tokenizer_from_gguf

    return tokenizer_from_gguf(smollm2_135m_instruct())


def ours(data: object, tokenizer) -> Batches:
    """The loader of the trainer on a file or a dataset."""
    from easydel.data.batching.collate import Collator
    from easydel.data.batching.loader import PreferenceLoader
    from easydel.data.batching.packing import PackingLayout
    from easydel.data.preference.transform import PreferenceTransform
    from easydel.data.sources.huggingface import HuggingFaceSource
    from easydel.data.sources.open_source import open_source

    source = open_source(data) if isinstance(data, Path) else HuggingFaceSource(data)
    collate = Collator(PackingLayout(tokenizer.pad_token_id), len(tokenizer))
    return PreferenceLoader(
        source, PreferenceTransform(tokenizer), collate, batch_size=BATCH_SIZE, max_dropped_share=0.5, shuffle_seed=SEED
    )


def tokenised(dataset, tokenizer, **options):
    """Template, then tokens, each a pass of `map`."""

    def template(row):
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        whole = {
            side: tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
            for side in ("chosen", "rejected")
        }
        return {"prompt": prompt} | {side: text.removeprefix(prompt) for side, text in whole.items()}

    def tokenise(row):
        return {f"{field}_ids": tokenizer(row[field], add_special_tokens=False)["input_ids"][:512] for field in LENGTHS}

    return dataset.map(template, **options).map(tokenise, remove_columns=list(LENGTHS), **options)


def padded(dataset) -> Iterator[object]:
    """Batches of prompt and completion, padded to the longest."""
    for batch in dataset.iter(batch_size=BATCH_SIZE):
        sides = [p + c for side in ("chosen", "rejected") for p, c in zip(batch["prompt_ids"], batch[f"{side}_ids"])]
        ids = np.zeros((len(sides), max(map(len, sides))), np.int32)
        for row, side in enumerate(sides):
            ids[row, : len(side)] = side
        yield ids


def arrow_dataset(folder: Path):
    from datasets import Dataset

    return Dataset.from_file(str(folder / "rows.arrow"))


def eager(folder: Path, tokenizer) -> Batches:
    whole = tokenised(arrow_dataset(folder), tokenizer, load_from_cache_file=False)
    return padded(whole.shuffle(seed=SEED))


def iterable(folder: Path, tokenizer) -> Batches:
    stream = arrow_dataset(folder).to_iterable_dataset().shuffle(seed=SEED, buffer_size=10_000)
    return padded(tokenised(stream, tokenizer))


WAYS: dict[str, Callable[[Path, object], Batches]] = {
    "ours, JSON lines": lambda folder, tokenizer: ours(folder / "rows.jsonl", tokenizer),
    "ours, Parquet": lambda folder, tokenizer: ours(folder / "rows.parquet", tokenizer),
    "ours, Arrow": lambda folder, tokenizer: ours(folder / "rows.arrow", tokenizer),
    "ours, IterableDataset": lambda folder, tokenizer: ours(arrow_dataset(folder).to_iterable_dataset(), tokenizer),
    "IterableDataset.map": iterable,
    "Dataset.map": eager,
}


def measure(way: str, folder: Path, whole: bool) -> dict[str, float]:
    """Seconds to the first batch and to the last, and the peak of memory over what it was at the start, in MB."""
    import datasets

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer()
    ours(datasets.Dataset.from_list([]), tokenizer)  # imports
    tokenizer.apply_chat_template([{"role": "user", "content": "warm"}], tokenize=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    batches = iter(WAYS[way](folder, tokenizer))
    next(batches)
    first = time.perf_counter() - started
    for _ in batches if whole else ():
        pass
    total = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"first": first, "total": total, "memory": (peak - before) / 1024}


def measured(way: str, folder: Path, whole: bool) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.lazy_data", "--measure", way, "--folder", str(folder)] + [
        "--whole"
    ] * whole
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{way} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--whole-up-to", type=int, default=10_000, help="largest file that is read to its end")
    parser.add_argument("--eager-up-to", type=int, default=100_000, help="largest file for Dataset.map")
    parser.add_argument("--repeats", type=int, default=3, help="the median of so many runs is shown")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure, arguments.folder, arguments.whole)))
        return
    print("| rows | way | first batch, s | all rows, s | rows a second | peak memory, MB more |")
    print("|---|---|---|---|---|---|", flush=True)
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory(prefix="easydel-lazy-data-") as name:
            folder, whole = Path(name), rows <= arguments.whole_up_to
            write_files(folder, rows)
            for way in WAYS:
                is_eager = way == "Dataset.map"
                if is_eager and rows > arguments.eager_up_to:
                    print(f"| {rows:,} | {way} | not run | not run | | |", flush=True)
                    continue
                # Mapping 100 000 rows takes minutes, and once is enough to see it.
                repeats = 1 if is_eager and rows > 10_000 else arguments.repeats
                runs = [measured(way, folder, whole) for _ in range(repeats)]
                first, total, memory = (median(run[key] for run in runs) for key in ("first", "total", "memory"))
                all_rows = f"{total:.1f} | {rows / total:,.0f}" if whole else "not run |"
                print(f"| {rows:,} | {way} | {first:.2f} | {all_rows} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
