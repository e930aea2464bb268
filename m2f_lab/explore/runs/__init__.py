"""Runs: watched live, and compared."""
