"""What fits the rooms into verl: trainer, agent loop, registrations.

With `lab` the only room that imports verl.
"""
