"""CounterfactualExplorer: change one thing and run the decoder again."""
