"""``patch``: a small network in closed form that changes exactly the given labels; ``solver.py`` is the way in."""
