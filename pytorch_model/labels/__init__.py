"""Class names: the tables of known data sets, and label files of every form as names by class id.

``files.parse_names`` reads a file's content as id → name, as the file states them; ``classes.class_names``
says which class of a model each name belongs to. Neither knows the network.
"""
