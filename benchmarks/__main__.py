"""``python -m benchmarks``: the figures of the README, one benchmark after the other."""

from __future__ import annotations

import sys

from benchmarks import serving

if __name__ == "__main__":
    sys.exit(serving.main(sys.argv[1:]))
