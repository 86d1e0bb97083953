"""`python -m recipe.soup.verify`, the older name of `soup verify`."""

from recipe.soup.tools.verify import main  # noqa: TID251  # an older name of it

if __name__ == "__main__":
    main()
