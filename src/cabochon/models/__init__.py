"""Models: the Gemma family, and any other causal language model through transformers."""
