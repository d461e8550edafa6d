"""The command lines: they turn arguments into options, call the library and print its results.

``main`` dispatches, ``arguments/`` has a parser and a frozen dataclass of options per command and loads
nothing heavy, ``commands/`` runs them. ``tools/*.py`` and the installed ``efficientdet-porting`` are both
this package.
"""
