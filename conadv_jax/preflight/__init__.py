"""Checks of hosts, data and work directory before a run starts there."""
