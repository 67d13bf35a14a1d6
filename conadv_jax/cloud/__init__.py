"""Machines that are rented: made, set up, run on, watched and deleted."""
