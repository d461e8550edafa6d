"""Speed: two or more sides of one task timed in turn in one run, as ratios of medians.

A figure is a plain dict that JSON can hold. Nothing here prints. Nobody compares a figure with a limit: what
is fast on one machine is slow on another.
"""
