"""QueryExplorer: one query through all layers."""
