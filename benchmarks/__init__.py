"""Scripts behind every speed and quality claim; each prints a table and writes JSON."""
