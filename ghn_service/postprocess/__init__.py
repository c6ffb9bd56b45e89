"""Repairs and rewrites predicted weights: diversity, orthogonality, low rank, and reports about them."""
