"""`python -m jaxent.cli`, the same as `python -m jaxent`."""

import sys

from jaxent.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
