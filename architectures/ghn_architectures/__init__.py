"""Reference networks by name, and random architectures without end, as torch modules and as graphs.

Import from ``ghn_architectures.registry`` and ``ghn_architectures.generator``; see ``docs/architectures.md``.
"""
