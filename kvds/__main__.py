"""The command line as ``python -m kvds COMMAND …``, which launchers start: ``deepspeed --module kvds distill …``."""

import sys

from kvds.cli import main

if __name__ == "__main__":
    sys.exit(main())
