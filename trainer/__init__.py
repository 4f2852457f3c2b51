"""Training methods and evaluation. Models, loaders and attacks arrive as objects."""
