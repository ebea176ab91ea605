"""Show what finished runs found: tables, statistics, published numbers, plots, screens."""
