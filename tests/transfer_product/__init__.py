"""What a user sees of ``source=``."""
