"""dualform: write a learner, get a sequence layer that learns at test time."""

from dualform.catalogue import Bound, Catalogue, CatalogueError

__version__ = "0.1.0"

__all__ = ["Bound", "Catalogue", "CatalogueError", "__version__"]
