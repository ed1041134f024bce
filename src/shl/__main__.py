"""`python -m shl` is `shl`."""

from shl.cli import program

if __name__ == "__main__":
    program()
