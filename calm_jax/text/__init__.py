"""Tokenizers: the kinds of vocabulary, and the files they come from."""
