"""Endurance: thousands of kills and resumes (`python -m soak`), and a fuzzer for what is read (`python -m soak.fuzz`)."""
