"""Folders on disks and object stores, steps and their manifests, the node cache, the hub."""
