"""Training as AutoML does it. It needs torch, numpy and Pillow only."""
