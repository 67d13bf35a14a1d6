"""Compiled programs, read: instructions, costs, collectives, schedules."""
