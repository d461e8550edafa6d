"""Training data: COCO-format folders and TFRecords as examples, examples as batches.

``sources.open_data`` opens either; ``loader.Loader`` makes batches of it that depend on nothing but the seed;
``augment`` changes images as AutoML does.
"""
