"""From logits to text: sampling, streaming, conversations, knowledge."""
