"""``python -m benchmarks``: the figures of the documentation, one benchmark after the other, with their defaults."""

from __future__ import annotations

import sys

from benchmarks import load, serving

if __name__ == "__main__":
    sys.exit(serving.main([]) or load.main([]))
