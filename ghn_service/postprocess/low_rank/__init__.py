"""Low-rank factors in the place of dense weights."""
