"""``python -m vllm_trace`` is the console script ``vllm-trace``."""

import signal
import sys

# Until there is a command line that takes it, Ctrl-C just ends this: no traceback out of an import.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from vllm_trace.cli import main as _main


def main() -> int:
    """The verb of ``sys.argv``; returns the exit code."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return _main()


if __name__ == "__main__":
    sys.exit(main())
