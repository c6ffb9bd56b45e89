"""``express``: a frozen random network that equals a trained one; ``solver.py`` is the way in."""
