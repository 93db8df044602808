"""The programs: each is run as `python -m experiments.<name>` and has `--help`."""

import signal
import sys

# `python -m` looks for the program while this is read: what it imports takes seconds, and a KeyboardInterrupt
# there becomes another error, or nothing. Until `cli.run` a Ctrl-C ends it as it ends other programs.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
