"""`python -m kl_kernels`."""

import sys

from kl_kernels.cli import main

sys.exit(main())
