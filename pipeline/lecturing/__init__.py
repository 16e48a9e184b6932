"""The parts of `lecture`: a module for each claim, whose `measure_claim` returns what it found."""
