"""One step of a run, repeated and looked into."""
