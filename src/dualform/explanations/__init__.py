"""A derivative told: the account of its steps, in words, formulas, code and pictures."""
