"""Reports: read Records and scores, compute nothing."""
