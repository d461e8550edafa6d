"""Damage done on purpose: mutated files for every reader, commands killed in the middle."""
