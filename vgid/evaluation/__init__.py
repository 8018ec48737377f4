"""Questions put to a model and marked."""
