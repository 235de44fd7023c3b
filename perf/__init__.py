"""Benchmarks: one timing method, named shapes, peers in the same run. See NOTES.md."""
