"""Predicts starting weights of neural networks from their architecture alone."""
