"""Older names, which users' configs hold."""
