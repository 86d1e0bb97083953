"""What runs leave behind, and how it is read: metrics, problems, estimators.

No verl, and nothing of the other rooms but `errors`.
"""
