"""Ray: connection, actor pools, tasks, progress, metrics, the ledger and the output's lease."""
