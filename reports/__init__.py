"""From run folders to curves and tables."""
