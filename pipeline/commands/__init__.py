"""The commands of `thawline`. Each parses, calls one stage and prints; heavy modules are imported inside."""
