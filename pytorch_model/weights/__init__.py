"""Weight files: safely read, checked, written. What is here knows tensors and configurations, not the network."""

SUFFIXES = (".safetensors", ".pth")
MODEL_FILE, CONFIG_FILE = "model.safetensors", "config.json"
