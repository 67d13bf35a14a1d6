"""Exit codes of the commands; docs/design.md says when each is used."""

USAGE = 2
MEMORY = 3
NONFINITE = 4
DATA = 5
HANG = 6
STORAGE = 7
HOST = 8
PREEMPTED = 42
INTERRUPTED = 130
