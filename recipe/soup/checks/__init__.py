"""Check a run's config, and refuse in one sentence what cannot be honoured, before Ray or a model loads.

May import what it checks (`algorithm`, `prefixes`); imports no verl.
"""
