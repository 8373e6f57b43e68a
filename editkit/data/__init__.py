"""Data: loaders that turn each format into cases, a fact with the prompts that measure its edit."""
