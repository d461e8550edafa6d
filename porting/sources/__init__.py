"""From a name, an address, a folder or a file to something that ``porting.checkpoint`` opens."""

#: What ``--ckpt`` begins with for a seeded checkpoint that is written first: ``synthetic:efficientdet-d4``.
SYNTHETIC = "synthetic:"
