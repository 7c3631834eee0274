"""Turn rows of any source into tokenised preference pairs, and those into batches; numpy only, never jax.

Read on in the order of a row: `sources` (rows of any origin), `preference` (a row becomes a pair), `tree` (the pair),
and `batching` (pairs become batches). `faults` names what is wrong with a row.
"""

from easydel.data.faults import FAULT_REASONS, DataError, FaultReason, FaultTally, RowFault, UnreadableRow
from easydel.data.preference.show import render_fault, render_pair, render_tree
from easydel.data.preference.transform import PreferenceTransform
from easydel.data.sources.base import CompositeSource, ShardedDataSource
from easydel.data.sources.files import (
    ArrowSource,
    CompressedJsonLinesSource,
    CsvSource,
    JsonLinesSource,
    JsonSource,
    ParquetSource,
)
from easydel.data.sources.huggingface import HuggingFaceSource
from easydel.data.sources.mixture import MixtureSource
from easydel.data.sources.open_source import open_source
from easydel.data.tree import Branch, PreferencePair, PromptTree

__all__ = [
    "FAULT_REASONS",
    "ArrowSource",
    "Branch",
    "CompositeSource",
    "CompressedJsonLinesSource",
    "CsvSource",
    "DataError",
    "FaultReason",
    "FaultTally",
    "HuggingFaceSource",
    "JsonLinesSource",
    "JsonSource",
    "MixtureSource",
    "ParquetSource",
    "PreferencePair",
    "PreferenceTransform",
    "PromptTree",
    "RowFault",
    "ShardedDataSource",
    "UnreadableRow",
    "open_source",
    "render_fault",
    "render_pair",
    "render_tree",
]
