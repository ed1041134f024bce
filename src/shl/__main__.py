"""`python -m shl` is `shl`."""

from shl.cli import main

if __name__ == "__main__":
    main()
