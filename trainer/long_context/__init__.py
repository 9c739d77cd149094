"""What a model makes of long texts: retrieval by length and depth, loss by position."""
