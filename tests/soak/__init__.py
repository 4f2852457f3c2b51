"""Endurance: thousands of kills and resumes (`python -m tests.soak`), and a fuzzer for what is read
(`python -m tests.soak.fuzz`)."""
