"""Text formats of other programs, read safely: YAML, and the text format of protocol buffers."""
