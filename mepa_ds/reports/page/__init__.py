"""The page of one or several runs: `mepa report` writes it as one HTML file."""
