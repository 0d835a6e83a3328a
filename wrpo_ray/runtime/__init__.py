"""What runs on Ray: connection, actors, tasks, progress, the ledger and the lease of an output."""
