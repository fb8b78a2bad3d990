"""The report: one HTML file about a set of runs."""
