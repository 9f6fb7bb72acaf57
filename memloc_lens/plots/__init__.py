"""Pictures of runs, sequences and scores."""
