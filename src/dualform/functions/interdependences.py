"""Interdependence functions xi: which attributes and instances depend on which. The catalogue is empty as yet."""

from __future__ import annotations

from dualform.catalogue import Catalogue

interdependences = Catalogue("interdependences")
