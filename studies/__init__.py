"""Studies: many runs from one grid file, planned, launched, watched and continued."""
