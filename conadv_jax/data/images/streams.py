"""Random numbers of an example: a stream for each op, never renumbered."""

CROP = 0
FLIP = 1
AA_CROP = 2
AA_FLIP = 3
AA_POLICY = 4
