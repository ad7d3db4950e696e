"""`python -m tare`: the command line, for launchers that start modules, such as torchrun."""

import sys

from tare.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
