"""``python -m fedgrove`` is the command ``fedgrove``: for a virtual environment whose ``bin`` is not on the path."""

from fedgrove.cli import main

if __name__ == "__main__":
    main()
