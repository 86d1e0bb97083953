"""What runs leave behind, and how it is read: metrics, problems, estimators.

Imports no verl, and of the other rooms only `errors`.
"""
