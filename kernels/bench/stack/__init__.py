"""Proofs and manifests of one machine."""
