"""COCO's figures of a model.

``run.evaluate_dataset`` runs a whole evaluation of a ``dataset.read_dataset``; ``figures.evaluate`` computes the
figures of given detections; ``metrics.Metrics`` is the file that an evaluation leaves.
"""
