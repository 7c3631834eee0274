"""`python -m easydel` is the `easydel` command."""

import sys

from easydel.cli import main

if __name__ == "__main__":
    sys.exit(main())
