"""A memory as a folder: what is kept, how it is checked, read and combined."""
