"""Answers to people: generation, chat, memorising and asking."""
