"""The diagnosis: why the first layer that differs is wrong."""
