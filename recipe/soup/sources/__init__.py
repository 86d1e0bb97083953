"""Where prefixes come from: one file for each source, behind the interface of `base.py`."""
