"""`python -m fastnst`: the command line, also below torchrun."""

from fastnst.cli.main import main

if __name__ == "__main__":
    main()
