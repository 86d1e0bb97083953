"""From a run's config to a refusal in one sentence, before Ray or a model loads.

May import what it checks (`algorithm`, `prefixes`); no verl.
"""
