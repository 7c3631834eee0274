"""Make batches of pairs: `loader` orders them, `collate` and `packing` lay them out as trees in rows."""
