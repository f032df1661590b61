"""What a structured linear map is: terms, their relations, sums, products and contraction; no graph, no op's rule."""
