"""`python -m recipe.soup.verify`, the older name of `soup verify`."""

from recipe.soup.tools.verify import main

if __name__ == "__main__":
    main()
