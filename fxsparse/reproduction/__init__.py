"""The reproducibility report's CIFAR-10 tables, run again: the figures, the queue of runs, results, and their page.

`published` holds the figures, `queue` the runs that answer them, `slices` does those runs a while at a time,
`results` and `page` turn finished ones into files. `tools/reproduce.py` is the command over it.
"""
