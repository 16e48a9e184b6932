"""The commands of `thawline`: each parses, calls one stage and prints; what is heavy is imported inside."""
