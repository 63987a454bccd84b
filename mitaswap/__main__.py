"""`python -m mitaswap` is the `mitaswap` command."""

from mitaswap.cli import main

if __name__ == "__main__":
    main()
