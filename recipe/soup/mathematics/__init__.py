"""Boxed answers, their grading, the reward for mathematics, and its datasets.

No verl, and nothing of the other rooms but `errors`.
"""
