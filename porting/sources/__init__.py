"""The sources that ``--ckpt`` accepts: paths, names of Google's releases, and synthetic checkpoints."""

#: Prefix of ``--ckpt`` for a seeded checkpoint, which is written first: ``synthetic:efficientdet-d4``.
SYNTHETIC = "synthetic:"
