"""`python -m editkit` is `python -m editkit.run`."""

from editkit.run import main

main()
