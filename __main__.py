"""``python -m kvtool``."""

from kvtool.cli import main

if __name__ == "__main__":
    main()
