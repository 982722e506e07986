"""`python -m narrowcast.cli` is the command `narrowcast`."""

from narrowcast.cli import main

main()
