"""What tests share: made inputs, servers, a Ray head, runs of the command."""
