"""Recipes: each file makes the configuration of a run, from the defaults."""
