"""The demo and the recall study behind it."""
