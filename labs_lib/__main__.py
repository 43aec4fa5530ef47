"""`python -m labs_lib` is `labs`."""

import sys

from labs_lib.cli import main

if __name__ == "__main__":
    sys.exit(main())
