"""Many runs from one grid file: planned, started, watched, continued."""
