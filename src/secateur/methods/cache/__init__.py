"""Methods that make the KV cache smaller: tokens, channels and elements that leave while a model runs."""
