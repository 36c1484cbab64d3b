"""Bridges into other libraries; each imports its library, and may fail to."""
