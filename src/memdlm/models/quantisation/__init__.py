"""4-bit base weights."""
