"""Where prefixes come from: sampled ahead of time, sampled by past weights, or replayed.

May import `settings` and `errors`; imports no verl and nothing of the update.
"""
