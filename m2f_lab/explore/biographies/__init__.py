"""Biographies: what every query does over a whole data set."""
