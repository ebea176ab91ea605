"""Train lanes: one loop for every method, on one teacher pass and one batch a step."""
