"""Decoder-only transformers: layers -> attention -> transformer."""
