"""What each tool does around its main()."""
import os
import signal
import sys


def run(main):
    """main(), quietly ended where the reader of its output is gone (`| head`)."""
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        sys.exit(128 + signal.SIGPIPE)
