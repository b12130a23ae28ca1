"""`python tools/train.py ...` is `fxsparse train ...`."""

import sys

from fxsparse.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
