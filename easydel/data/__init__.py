"""Rows in, tokenised preference pairs out: sources, the transform, faults, and how to show them."""

from easydel.data.faults import FAULT_REASONS, DataError, FaultReason, FaultTally, RowFault, UnreadableRow
from easydel.data.preference.show import render_fault, render_pair
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
from easydel.data.tree import PreferencePair

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
