"""A run's records: metrics.jsonl, MLflow, provenance, the report of one or more runs."""
