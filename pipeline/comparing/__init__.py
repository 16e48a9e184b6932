"""The parts of a comparison: the plan, its jobs, the folder that keeps their results, and what they show."""
