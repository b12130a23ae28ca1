"""What `tools/coverage.py` surveys and how: the sets of models, the measurement of one, the page."""
