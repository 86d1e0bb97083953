"""Boxed answers, their grading, the reward for mathematics, and its datasets.

Imports no verl, and of the other rooms only `errors`.
"""
