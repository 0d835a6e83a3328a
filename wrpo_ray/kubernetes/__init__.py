"""Offline checks of Kubernetes manifests: will KubeRay and Ray accept them and find room?"""
