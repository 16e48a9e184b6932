"""Pictures of results: functions that draw on given axes, and others that return a whole matplotlib Figure."""
