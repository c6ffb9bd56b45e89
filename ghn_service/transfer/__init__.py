"""Weights from a trained network: exact where the target contains it."""
