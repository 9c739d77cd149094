"""Entry points, each a short script."""
