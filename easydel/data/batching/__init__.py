"""Pairs become batches: shuffled, packed as trees into rows, collated."""
