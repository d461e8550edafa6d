"""Formats of other programs, read safely: YAML, and protocol buffers as text and as bytes."""
