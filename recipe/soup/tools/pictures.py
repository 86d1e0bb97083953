"""How all pictures are drawn: import it before the first."""

import matplotlib as mpl

mpl.use("Agg")
# Names of runs and datasets may have dollar signs, which are not formulas.
mpl.rcParams["text.parse_math"] = False
