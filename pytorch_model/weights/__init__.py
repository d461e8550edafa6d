"""Weight files: read safely, checked, written. It knows tensors and configurations, not the network."""

SUFFIXES = (".safetensors", ".pth")
#: Key of the metadata, and its value, of weights whose gamma and moving statistics mean nothing, because
#: their source had folded the batch norms away. Other weights do not have the key.
BATCH_NORM_STATISTICS, MADE_UP = "batch_norm_statistics", "made up"
MODEL_FILE, CONFIG_FILE = "model.safetensors", "config.json"
