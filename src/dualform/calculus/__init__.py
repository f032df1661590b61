"""Structured derivatives of tensor functions: traced, composed and contracted with their deltas kept."""
