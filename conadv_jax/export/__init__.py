"""The network of a run as a file for others, with its model card."""
