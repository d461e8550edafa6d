"""AutoML's EfficientDet in plain TensorFlow ops over a ``{variable name: tensor}`` mapping.

No Keras layers and no hidden state. Importing this package does not import TensorFlow; only the
modules that compute do (``layers``, ``efficientnet``, ``bifpn``, ``heads``, ``efficientdet``).
"""
