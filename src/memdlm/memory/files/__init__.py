"""A memory as a folder: what is saved, how it is checked, read and combined."""
