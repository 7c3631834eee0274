"""Fuzzers for everything that comes from outside: rows, files, model folders, templates, run files, checkpoints.

Read in this order: `targets` (what is tried), `judge` (what may happen), `supervise` (how a process that dies is
survived), `__main__` (the table).
"""
