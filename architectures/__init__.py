"""Reference networks by name, and random architectures without end, as torch modules and as graphs.

Import from ``architectures.registry`` and ``architectures.generator``; ``docs/architectures.md`` describes both.
"""
