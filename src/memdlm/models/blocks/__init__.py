"""What networks are built of, and the names of their weights in files."""
