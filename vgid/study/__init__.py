"""Many trials: the plan, the search, the record, MLflow."""
