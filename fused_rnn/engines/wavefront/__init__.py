"""A stack of layers whose layers overlap in time, on several streams of a GPU."""
