"""People and their questions: a benchmark read, checked, split, fetched or made up."""
