"""`python tools/flopcount.py ...` is `fxsparse flops ...`."""

import sys

from fxsparse.cli import main

if __name__ == "__main__":
    sys.exit(main(["flops", *sys.argv[1:]]))
