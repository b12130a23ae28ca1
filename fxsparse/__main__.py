"""`python -m fxsparse`: the command."""

import sys

from fxsparse.cli import main

if __name__ == "__main__":
    sys.exit(main())
