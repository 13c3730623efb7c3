"""The streaming engine: row losses of hidden states without the logits."""
