"""One module per command: its parser (``add_arguments``) and its options (``read_options``).

A module's docstring is the command's description. Nothing here imports torch, TensorFlow or rich, so that
``--help`` and bad usage are answered at once.
"""
