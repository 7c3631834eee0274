"""Rows in, tokenised preference pairs out: sources, the transform, faults, and how to show them."""

from .faults import FAULT_REASONS, DataError, FaultReason, FaultTally, RowFault, UnreadableRow
from .files import (
    ArrowSource,
    CompressedJsonLinesSource,
    CsvSource,
    JsonLinesSource,
    JsonSource,
    ParquetSource,
)
from .huggingface import HuggingFaceSource
from .mixture import MixtureSource
from .open_source import open_source
from .preference import PreferencePair, PreferenceTransform
from .show import render_fault, render_pair
from .sources import CompositeSource, ShardedDataSource

__all__ = [
    "FAULT_REASONS",
    "ArrowSource",
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
    "RowFault",
    "ShardedDataSource",
    "UnreadableRow",
    "open_source",
    "render_fault",
    "render_pair",
]
