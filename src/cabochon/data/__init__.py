"""Text in, token rows out: tokenizers, chats, readers, the embedded corpus, packing, mixtures."""
