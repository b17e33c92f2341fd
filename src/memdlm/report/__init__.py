"""Numbers -> pages: a report of runs, and the trace of a decoding."""
