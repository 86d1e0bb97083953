"""The paper: ratios, baselines, losses and what is measured of them, in torch and numpy.

Imports nothing of the other rooms, and no verl.
"""
