"""`python -m recipe.soup.verify`: an older name of `soup-verl verify`, which users' scripts may have."""

import sys

from recipe.soup.tools.cli import main  # noqa: TID251  # an older name of it

if __name__ == "__main__":
    main(["verify", *sys.argv[1:]])
