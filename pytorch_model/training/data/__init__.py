"""Training data: what goes from annotated images into a batch."""
