"""What the benchmarks against peers are made of: rows, contenders, arithmetic, tables."""
