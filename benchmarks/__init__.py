"""Measurements: each prints its figures beside a rival or a limit that is measured in the same run."""
