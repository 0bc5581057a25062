"""``python -m vllm_trace`` is the console script ``vllm-trace``."""

import sys

from vllm_trace.cli import main

if __name__ == "__main__":
    sys.exit(main())
