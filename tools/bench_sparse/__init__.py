"""`python tools/bench.py sparse`: what unstructured sparsity saves. `command` is the entry, `goals` the rows."""
