"""The training engine: one loop for every method, from where teachers come from to what is left on disk."""
