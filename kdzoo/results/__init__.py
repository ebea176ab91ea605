"""Read finished runs: tables, statistics, published numbers, plots."""
