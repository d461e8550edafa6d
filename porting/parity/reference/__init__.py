"""References to compare with: this project's reading of AutoML's network, or a file that holds the network.

``ops`` is :mod:`tf_reference`. The others run a file: ``meta`` the graph saved with a checkpoint,
``savedmodel`` an exported model, ``tflite`` an EfficientDet-Lite file.
"""

OPS, META, SAVED_MODEL, TFLITE = "ops", "meta", "savedmodel", "tflite"
KINDS = (OPS, META, SAVED_MODEL, TFLITE)
