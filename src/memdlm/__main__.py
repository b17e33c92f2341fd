"""`python -m memdlm` is the `memdlm` command."""

import sys

from memdlm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
