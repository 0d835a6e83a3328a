"""What every stage shares: records, storage, steps, chat rendering, the cluster."""
