"""Where prefixes come from: sampled ahead of time, by past weights, or replayed.

May import `settings` and `errors`; no verl, and nothing of the update.
"""
