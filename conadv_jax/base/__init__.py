"""Errors with their exit codes, storage that retries, faults on purpose."""
