"""The proof of an engine: it computes the function of the eager network, down to the detections."""
