"""A second, frozen or lagged policy beside the one that verl trains: see README.md in this folder."""
