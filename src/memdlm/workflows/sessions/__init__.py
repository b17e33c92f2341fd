"""Sessions with a model: generation, chat, memorising and asking."""
