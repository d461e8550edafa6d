"""Releases: weights and their evidence in one folder, made, checked and described."""

#: The licence of every checkpoint that AutoML released.
GOOGLES_LICENSE = "apache-2.0"
