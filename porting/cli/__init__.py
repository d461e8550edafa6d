"""The command lines: what a user types, turned into options; what a library call returns, drawn.

``main`` dispatches, ``arguments/`` has a parser and a frozen dataclass of options per command and loads nothing
heavy, ``commands/`` runs them. ``tools/*.py`` and the installed ``efficientdet-porting`` are both this package.
"""
