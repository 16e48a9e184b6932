"""HTML pages that load nothing from elsewhere: the report of a comparison, and what units see."""
