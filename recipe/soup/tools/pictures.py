"""How all pictures are drawn: import it before the first."""

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter

mpl.use("Agg")
# Names of runs and datasets may have dollar signs, which are not formulas.
mpl.rcParams["text.parse_math"] = False


def logarithmic(axis: Axes) -> None:
    """Give an axis a logarithmic height. By itself matplotlib writes its numbers as formulas."""
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
