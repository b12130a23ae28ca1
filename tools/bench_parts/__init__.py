"""What the benchmarks share: processes of their own, the competitors' environments, the machine, bytes, files."""
