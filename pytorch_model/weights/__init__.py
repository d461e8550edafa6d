"""Weight files: read safely, checked, written. It knows tensors and configurations, not the network."""

SUFFIXES = (".safetensors", ".pth")
MODEL_FILE, CONFIG_FILE = "model.safetensors", "config.json"
