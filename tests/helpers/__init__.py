"""Share between tests a tiny model, small data sets, tiny models of other projects, and a Hub on loopback."""
