"""`python -m kl_kernels`."""

import signal
import sys

from kl_kernels.cli import main

if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background jobs ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())
