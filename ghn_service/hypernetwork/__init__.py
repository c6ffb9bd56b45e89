"""Graph hypernetworks: from an architecture's graph to values for its parameters."""
