"""Networks, ours and others, as the masked process calls them."""
