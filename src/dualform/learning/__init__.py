"""Learners, objectives and rules; the derivation of chunk programs from them; the layer around one."""
