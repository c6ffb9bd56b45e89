"""Training, evaluation and inspection of hypernetworks: what ``ghn-train`` runs."""
