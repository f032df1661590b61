"""Data compressions kappa: R^m -> R^D with D < m. The catalogue is empty as yet."""

from __future__ import annotations

from dualform.catalogue import Catalogue

compressions = Catalogue("compressions")
