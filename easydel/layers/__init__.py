"""Provide the layers that model families are built from, and add adapters or 8-bit weights to those of a model."""
