"""A backbone loaded, read, decoded and adapted."""
