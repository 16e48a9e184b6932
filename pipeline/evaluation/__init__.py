"""Which rows train, which rows judge, and what the judgement is worth."""
