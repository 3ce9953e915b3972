"""The report of a study: its laws, figures and one HTML page."""
