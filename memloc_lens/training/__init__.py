"""How the embedded model was made: its corpus, its training run and its card."""
