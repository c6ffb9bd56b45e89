"""Measures a hypernetwork: zero-shot accuracy, fine-tuning against He initialisation, and novelty."""
