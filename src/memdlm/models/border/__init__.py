"""A network, ours or another, as the masked process sees it."""
