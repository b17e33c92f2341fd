"""Token ids -> hidden states -> logits: the network families and what they are made of."""
