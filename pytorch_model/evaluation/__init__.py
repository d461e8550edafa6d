"""COCO's figures of a model.

``run.evaluate_dataset`` runs a whole evaluation of a ``dataset.Dataset``; ``figures.evaluate`` computes the
figures of given detections; ``metrics.Metrics`` is the content of the ``metrics.json`` that a run writes.
"""
