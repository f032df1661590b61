"""What is done to a trace: make it, bring it into one form, differentiate it, split it."""
