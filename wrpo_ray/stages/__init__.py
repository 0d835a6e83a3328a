"""The stages, in the order of the data; none imports another."""
