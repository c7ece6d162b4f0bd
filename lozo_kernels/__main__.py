"""``python -m lozo_kernels`` is the command ``lozo-kernels``."""

import sys

from .cli.command import main

if __name__ == "__main__":
    sys.exit(main())
