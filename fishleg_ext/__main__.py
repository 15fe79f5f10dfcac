"""`python -m fishleg_ext`: the command line, where its script is not on the PATH."""

import sys

from fishleg_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
