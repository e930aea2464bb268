"""MatchingExplorer: which query the matcher gives each segment."""
