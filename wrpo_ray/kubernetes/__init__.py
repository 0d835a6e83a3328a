"""Offline checks of Kubernetes manifests: do they say what KubeRay and Ray will accept and need?"""
